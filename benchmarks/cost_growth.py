"""How search and training step grow with the codebook, in time and memory: measured, and one plot.

  python benchmarks/cost_growth.py --plot=docs/images/cost_growth.png
  python benchmarks/cost_growth.py --plot=PICTURE --rows=FILE     # draws the rows of an earlier run

The search of 2,048 tokens of 256 dimensions, ours and others (`nearest_code.py`), and our whole training step
(`train_step.py`) of the quickstart's small network on 32 images, which are 2,048 tokens too. The step's codes have 256
dimensions, and a bridge whose groups grow with the codebook so that it never has more than 4,096 tokens. It prints
the JSON objects of both scripts, one per line.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import nearest_code, train_step
from fvq_jax.tasks import default_config

DIM = 256
CODES = "1024,4096,16384,65536,262144,1048576"
STYLES = {  # method: label, colour, marker
    "fvq_jax": ("fvq_jax", "#0072B2", "o"),
    "jax_matrix": ("whole matrix, JAX", "#D55E00", "s"),
    "torch_cdist": ("cdist, PyTorch", "#CC79A7", "^"),
    "faiss": ("FAISS", "#009E73", "v"),
}


def small_config(codes, batch):
    """The quickstart's network with that many codes of 256 dimensions."""
    config = default_config()
    config.batch_size = batch
    config.tokenizer.update(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=64, dtype="float32")
    config.tokenizer.quantizer.codebook_size, config.tokenizer.quantizer.code_dim = codes, DIM
    config.tokenizer.quantizer.bridge = f"S/{next(p for p in (2, 4, 8, 16, 32) if codes <= 4096 * p * p)}"
    config.loss.perceptual_weight = config.adversarial.weight = 0.0
    config.data.image_size = 32
    return config


def measure(args):
    """Yields the rows of every size as soon as they are measured."""
    for codes in map(int, args.codes.split(",")):
        yield from nearest_code.compare(args.methods.split(","), args.tokens, codes, DIM, args.rounds, args.budget)
        config = small_config(codes, args.tokens // 64)
        yield from train_step.compare(config, "", ["fvq_jax"], args.rounds, args.budget)


def draw(rows, path):
    """Three panels over the number of codes, both axes logarithmic."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    searches = [row for row in rows if row.get("seconds") and "tokens" in row]
    steps = [row for row in rows if row.get("seconds") and "batch" in row]
    for method, (label, colour, marker) in STYLES.items():
        mine = [row for row in searches if row["method"] == method]
        if not mine:
            continue
        style = {"color": colour, "marker": marker, "markersize": 4}
        codes = [row["codes"] for row in mine]
        panels[0].plot(codes, [row["seconds"] for row in mine], label=label, **style)
        panels[2].plot(codes, [max(row["extra_mib"], 1) for row in mine], label=f"search: {label}", **style)
    codes = [row["codes"] for row in steps]
    style = {"color": "black", "marker": "D", "markersize": 4}
    panels[1].plot(codes, [row["seconds"] for row in steps], label="step", **style)
    share = [row["seconds"] * row["quantizer_share"] for row in steps]
    panels[1].plot(codes, share, label="quantizer and bridge alone", color="grey", linestyle="--")
    panels[2].plot(codes, [row["peak_mib"] for row in steps], label="step: fvq_jax", **style)
    moments = [3 * 4 * row["codes"] * row["dim"] / 2**20 for row in steps]
    panels[2].plot(codes, moments, label="codebook and its two moments", color="grey", linestyle=":")
    texts = (("Search", "seconds"), ("Training step", "seconds"), ("Peak memory", "MiB"))
    ticks = sorted({row["codes"] for row in rows})
    for panel, (title, unit) in zip(panels, texts, strict=True):
        panel.set(xscale="log", yscale="log", title=title, xlabel="codes", ylabel=unit)
        panel.set_xticks(ticks, [_short(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_ylim(top=panel.get_ylim()[1] * (panel.get_ylim()[1] / panel.get_ylim()[0]) ** 0.3)  # for the legend
        panel.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)


def _short(codes):
    power = int(math.log2(codes))
    return f"{codes >> 20}M" if power >= 20 else f"{codes >> 10}k" if power >= 10 else str(codes)


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", default=CODES, help="codebook sizes, squares")
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--methods", default=",".join(STYLES), help="searches that are compared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=30, help="seconds per search and per step of one size")
    parser.add_argument("--plot", help="the picture to write")
    parser.add_argument("--rows", help="rows to draw instead of measuring")
    return parser.parse_args(arguments)


def main():
    """Measures, or reads rows, and draws."""
    args = parse(sys.argv[1:])
    if args.rows:
        rows = [json.loads(line) for line in Path(args.rows).read_text().splitlines() if line.startswith("{")]
    else:
        rows = []
        for row in measure(args):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            rows.append(row)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
