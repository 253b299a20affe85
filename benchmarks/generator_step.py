"""Tokens per second of a generator's whole training step, beside the same step of `LlamaForCausalLM` in PyTorch.

  python benchmarks/generator_step.py --size=B --batch=2 --markdown    # on two cores; --size=L --batch=64 on a GPU

A step is forward and backward pass, clipping and AdamW on random codes, on one device. Ours is the training step of
`fvq_jax.main`, the peer the one of `llama.py`, eager and compiled. Both have float32 parameters and moments and as many
parameters, which is checked; products are in --dtype. Dropout is off on both sides, since the peer has none. The head
of ours starts at zero and that of the peer does not, so their losses differ a little at first.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import llama
from benchmarks.comparison import add_shape, finish, missing, shape_of
from benchmarks.processes import DoesNotFitError, Worker, alternate, machine, median_ratio, write_rows
from fvq_jax.runtime.allocation import has_accelerator

COLUMNS = {
    "method": "method",
    "batch": "batch",
    "seconds": "seconds per step",
    "tokens_per_second": "tokens / s",
    "speedup": "our speed / this",
    "first_loss": "first loss",
    "first_seconds": "first step after, s",
    "peak_mib": "peak MiB",
    "status": "",
}


def load_jax(shape: llama.Shape, dtype: str, labels: np.ndarray, codes: np.ndarray) -> Any:
    """Our step on labels [b] and codes [b, t]; see `processes.py` for what is returned."""
    import jax
    from jax.sharding import AxisType

    from fvq_jax.runtime.allocation import keep_memory
    from fvq_jax.runtime.mesh import global_batch
    from fvq_jax.tasks import default_config, task_of
    from fvq_jax.training.step import TrainStep

    keep_memory()  # as fvq_jax.main does
    config = default_config("generator")
    config.batch_size = len(labels)
    config.generator.update(grid=tuple(shape.grid), vocab=shape.vocab, classes=shape.classes, hidden=shape.hidden)
    config.generator.update(layers=shape.layers, width=shape.width, heads=shape.heads, dtype=dtype)
    config.generator.update(dropout=0.0, class_dropout=0.0, path_dropout=0.0)
    config.generator.unroll = jax.default_backend() == "cpu"
    mesh = jax.make_mesh((1, 1), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    task = task_of(config)(config, mesh)
    train_step = TrainStep.of(task, config, mesh, total_steps=1000, warmup_steps=100)
    batch = global_batch({"codes": codes.astype(np.int32), "label": labels.astype(np.int32)}, mesh)
    abstract = train_step.abstract()
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.networks[task.main].params))
    if found != shape.parameters:
        raise ValueError(f"our network has {found} parameters, and the peer's {shape.parameters}")
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init, step = jax.jit(train_step.init, out_shardings=layout), train_step.jitted(abstract)

    def build() -> dict[str, Any]:
        state = init(jax.random.key(0))

        def run() -> float:
            nonlocal state
            state, metrics = step(state, batch, task.frozen)
            return float(jax.block_until_ready(metrics).scalars["loss/total"])

        return {"ready": lambda: None, "step": run}

    return build


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per method: the methods alternate or, with `args.alone`, run one after the other."""
    shape, rng = shape_of(args), np.random.default_rng(0)
    batch = rng.integers(0, shape.classes, args.batch), rng.integers(0, shape.vocab, (args.batch, shape.tokens))
    programs = {
        "fvq_jax": ("jax", load_jax, shape, args.dtype),
        "transformers": ("torch", llama.load_training, shape, args.dtype, False),
        "transformers_compiled": ("torch", llama.load_training, shape, args.dtype, True),
    }
    shared = {"size": shape.size, "vocab": shape.vocab, "tokens": shape.tokens, "parameters": shape.parameters}
    shared |= {"dtype": args.dtype, "batch": args.batch, **machine()}
    ours = None  # seconds of every round
    for group in [[method] for method in args.methods] if args.alone else [args.methods]:
        rows, workers = {method: {"method": method, **shared} for method in group}, {}
        for method, row in rows.items():
            row["status"] = "" if method == "fvq_jax" else missing()
            if row["status"]:
                continue
            try:
                worker = Worker(*programs[method], *batch)
                first = worker.run("step")
                row["first_loss"], row["first_seconds"] = round(first.answer, 4), round(first.seconds, 2)
                workers[method] = worker
            except DoesNotFitError as error:
                row["status"] = str(error)
            except RuntimeError as error:
                row["status"] = f"failed: {error}"
        seconds = alternate(workers, ["step"], args.rounds, args.budget)
        ours = seconds.get(("fvq_jax", "step"), ours)
        for method, worker in workers.items():
            mine, row = seconds[method, "step"], rows[method]
            row["seconds"] = round(statistics.median(mine), 4)
            row["tokens_per_second"] = round(args.batch * shape.tokens / statistics.median(mine), 1)
            if ours:
                row["speedup"] = round(median_ratio(mine, ours), 3)
            row["held_mib"], row["peak_mib"] = round(worker.held), round(worker.peak())
            worker.close()
        yield from rows.values()


def main(argv: list[str] | None = None) -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="images in a step (default: %(default)s)")
    parser.add_argument(
        "--alone",
        action=argparse.BooleanOptionalAction,
        default=has_accelerator(),
        help="one program after the other, each with all memory (default: on a GPU or TPU)",
    )
    add_shape(parser)
    args = finish(parser, argv)
    write_rows(compare(args), COLUMNS, args.markdown)


if __name__ == "__main__":
    main()
