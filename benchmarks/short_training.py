"""A training run of a given time: a tokenizer on a folder of pictures, its usage and PSNR over steps.

  python benchmarks/short_training.py --seconds=120 --train=DIR --val=DIR --plot=training.png

Runs `fvq_jax.main` in a temporary folder for as many steps as the time allows, so that the learning rate is annealed
at its end. How many these are follows from --expect, the images per second to count on, and --start, the seconds that
go before the first step and between steps; without --expect a first run of a few steps measures both. Without --train
the pictures are the photographs that come with scikit-image and scikit-learn. There is no LPIPS, and the
discriminator's terms stay 0 in so short a run. What the run shows is that codes come into use and pictures get
better, not what the recipe reaches.

One JSON object per evaluation, as soon as there is one: step, usage, PSNR, perplexity, seconds since the start, and
images per second and MFU of the steps before it.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.processes import machine, markdown_table
from fvq_jax.training.metric_files import read_metrics

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "step": "step",
    "seconds": "seconds",
    "usage": "codes used",
    "perplexity": "perplexity",
    "psnr": "PSNR, dB",
    "images_per_second": "images / s",
    "mfu": "MFU",
    "status": "",
}
PROBE = 20  # steps of the first run
KEPT = 0.85  # of the time that is left is planned: evaluations and the last checkpoint take some
PATIENCE = 10  # seconds that a run gets to end by itself


def command(args: argparse.Namespace, workdir: Path, steps: int) -> list[str]:
    """The run with that many steps."""
    fields: dict[str, Any] = {
        "steps": steps,
        "epochs": 0.0,
        "optim.warmup_steps": max(1, steps // 20),
        "optim.warmup_epochs": 0.0,
        "optim.learning_rate": args.rate,
        "adversarial.start": steps + 1,
        "loss.perceptual_weight": 0.0,
        "data.image_size": args.size,
        "data.resize_min": args.size,
        "data.resize_max": args.size * 5 // 4,
        "data.source": "folder" if args.train else "photos",
        "data.num_workers": min(12, os.cpu_count() or 1),
        "data.timeout": 0.0,
        "batch_size": args.batch,
        "eval.batch_size": args.batch,
        "eval.images": args.images,
        "eval.crops": 0,
        "eval.every_steps": max(1, steps // args.evaluations),
        "log.every_steps": max(1, steps // 40),
        "checkpoint.every_steps": steps + 1,
    }
    if args.search:
        fields["tokenizer.quantizer.search_implementation"] = args.search
    if args.train:
        fields |= {"data.train_dir": args.train, "data.eval_dir": args.val}
    else:  # the tiles of the photographs are small already
        fields |= {"data.resize_min": 0, "data.resize_max": 0}
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "fvq_jax.main", f"--config={args.config}", f"--workdir={workdir}", *options]


def evaluations(workdir: Path) -> Iterator[dict[str, Any]]:
    """The evaluations that `metrics.jsonl` has so far, each with the rate of the log line before it."""
    rates: dict[str, float] = {}
    for row in read_metrics(workdir):
        if "images_per_second" in row:
            rates = {name: round(row[name], 4) for name in ("images_per_second", "mfu", "time/data", "time/compute")}
            rates["peak_mib"] = round(row["memory/peak_bytes"] / 2**20)
        elif "eval/psnr" in row:
            scores = {name: round(row[f"eval/{name}"], 4) for name in ("usage", "perplexity", "psnr", "ssim")}
            yield {"step": row["step"], **scores, **rates}


def follow(run: list[str], workdir: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """The evaluations of a run as they come; at the deadline (`time.monotonic`) it is told to stop, then made to.

    RuntimeError if the run fails before the deadline.
    """
    seen = 0
    process = subprocess.Popen(run, cwd=ROOT, stdout=sys.stderr)
    try:
        while True:
            over = process.poll() is not None
            for row in list(evaluations(workdir))[seen:]:
                seen += 1
                yield row
            if over:
                break
            if time.monotonic() > deadline:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
                return
            time.sleep(0.25)
        if process.returncode:
            raise RuntimeError(f"the run ended with code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def train(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of the run; those of a first one, which only measures, are left out."""
    began = time.monotonic()
    deadline = began + args.seconds - PATIENCE
    if args.expect:
        step, overhead = args.batch / args.expect, args.start
    else:
        found = measured(args, folder, deadline)
        if found is None:
            yield {"status": f"no step was measured in {args.seconds:.0f} seconds"}
            return
        step, overhead = found
    left = deadline - time.monotonic() - overhead
    steps = int(KEPT * left / step)
    if steps < args.evaluations:
        yield {"status": f"no time for a run: start and compilation take {overhead:.0f} s, a step {step:.3f} s"}
        return
    shared = {"of_steps": steps, "batch": args.batch, "size": args.size, "rate": args.rate, **machine()}
    shared["data"] = "folder" if args.train else "photos"
    for row in follow(command(args, folder / "run", steps), folder / "run", deadline):
        yield row | {"seconds": round(time.monotonic() - began, 1), "status": "", **shared}


def measured(args: argparse.Namespace, folder: Path, deadline: float) -> tuple[float, float] | None:
    """Seconds of a step and of everything else in a run of a few steps; None if the time was over before."""
    began = time.monotonic()
    list(follow(command(args, folder / "probe", PROBE), folder / "probe", deadline))
    logged = [row["images_per_second"] for row in read_metrics(folder / "probe") if row.get("images_per_second")]
    if not logged:
        return None
    step = args.batch / statistics.median(logged)
    return step, max(0.0, time.monotonic() - began - PROBE * step)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Usage and PSNR over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    steps = [row["step"] for row in rows]
    panels[0].plot(steps, [100 * row["usage"] for row in rows], marker="o", color="#0072B2")
    panels[0].set(title="Codes used in an evaluation, %", xlabel="step", ylim=(0, None))
    panels[1].plot(steps, [row["psnr"] for row in rows], marker="o", color="#D55E00")
    panels[1].set(title="PSNR, dB", xlabel="step")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="for everything (default: %(default)s)")
    parser.add_argument("--config", default="configs/fvq16k.py", help="default: %(default)s")
    parser.add_argument("--train", help="folder of pictures to train on")
    parser.add_argument("--val", help="folder of pictures to evaluate on")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1024, help="in an evaluation (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=6, help="about how many (default: %(default)s)")
    parser.add_argument("--expect", type=float, default=0.0, help="images per second; 0: a first run measures them")
    parser.add_argument("--start", type=float, default=60, help="seconds without steps (default: %(default)s)")
    parser.add_argument("--search", help="implementation of the search: auto, xla or tree (default: the config's)")
    parser.add_argument("--plot", help="picture to write")
    parser.add_argument("--markdown", action="store_true", help="a table after the rows")
    args = parser.parse_args()
    if bool(args.train) != bool(args.val):
        parser.error("--train and --val are needed together")
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for row in train(args, Path(folder)):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            rows.append(row)
            if args.plot and "step" in row:
                draw(rows, args.plot)
    if args.markdown:
        sys.stdout.write("\n" + markdown_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
