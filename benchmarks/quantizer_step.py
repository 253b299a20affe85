"""Time of the whole training step with every quantizer of configs/rivals.py, relative to `none`.

  python benchmarks/quantizer_step.py --markdown

Network, batch and codes are those of the config; pictures are random. Every step has a process of its own, compiled
before anything is timed, and the steps run in turn. A ratio is the median of those within a round, so load on the
machine moves it less than the seconds.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.processes import Worker, alternate, machine, median_ratio, write_rows
from configs import rivals

BASE = "none"  # what the others are compared with
COLUMNS = {"rival": "quantizer", "seconds": "seconds per step", "ratio": "relative to none"}


def load(config: ConfigDict) -> Any:
    """The step as a program for `processes.py`."""
    import jax

    from benchmarks.jax_step import compiled_step
    from fvq_jax.runtime.allocation import keep_memory
    from fvq_jax.runtime.mesh import make_mesh

    keep_memory()  # as fvq_jax.main does
    size = config.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (config.batch_size, size, size, 3), np.uint8)
    ours = compiled_step(config, make_mesh(1, 1, jax.devices()[:1]), images)

    def build() -> dict[str, Any]:
        state = ours.init(jax.random.key(config.seed))

        def run() -> None:
            nonlocal state
            state, metrics = ours.step(state, ours.batch, ours.task.frozen)
            jax.block_until_ready(metrics)

        return {"step": run}

    return build


def compare(configs: dict[str, ConfigDict], rounds: int, budget: float) -> Iterator[dict[str, Any]]:
    """A row for every config, of which one is called BASE."""
    workers = {name: Worker("jax", load, config) for name, config in configs.items()}
    seconds = {name: found for (name, _), found in alternate(workers, ["step"], rounds, budget).items()}
    for worker in workers.values():
        worker.close()
    for name, found in seconds.items():
        row = {"rival": name, "batch": configs[name].batch_size, "seconds": round(statistics.median(found), 4)}
        yield row | {"ratio": round(median_ratio(found, seconds[BASE]), 3), "rounds": len(found), **machine()}


def main(argv: list[str] | None = None) -> None:
    """Prints a row for every quantizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", nargs="+", choices=rivals.RIVALS, default=list(rivals.RIVALS), metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to try the program")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--budget", type=float, default=240, help="seconds for them; at least two rounds are run")
    parser.add_argument("--markdown", action="store_true", help="a table after the rows")
    args = parser.parse_args(argv)
    size = ",smoke" if args.smoke else ""
    names = [BASE, *(name for name in args.rivals if name != BASE)]
    configs = {name: rivals.get_config(f"rival={name}{size}") for name in names}
    write_rows(compare(configs, args.rounds, args.budget), COLUMNS, args.markdown)


if __name__ == "__main__":
    main()
