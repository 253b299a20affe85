"""Images per second of sampling codes, beside `LlamaForCausalLM` of the same size, and beside the machine's limit.

  python benchmarks/sampling.py --size=B --batches=1,8,64 --markdown    # on two cores; --size=L and more on a GPU

Ours is `fvq_jax.Generator.sample_codes`, the peer a loop around the package transformers (`llama.py`), eager and
compiled; both have random weights, guide, and draw from all codes. An image is its codes: none is decoded. The time
to the first image is that of the first call in a new process with the weights in memory: compiling and a whole batch.

`of_limit` is the rate over what reading the weights once per step and the cache as far as it is filled would allow, or
the products of matrices, at the highest rates of both that were measured so far (`limits.py`, with JAX and PyTorch).
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import limits, llama
from benchmarks.comparison import add_shape, finish, missing, shape_of
from benchmarks.processes import DoesNotFitError, Worker, alternate, machine, median_ratio, write_rows

COLUMNS = {
    "method": "method",
    "batch": "batch",
    "images_per_second": "images / s",
    "speedup": "our speed / this",
    "of_limit": "of the limit",
    "bound": "bound by",
    "first_seconds": "first image after, s",
    "peak_mib": "peak MiB",
    "status": "",
}


def load_jax(path: str, classes: int, dtype: str, batches: list[int], guidance: float) -> Any:
    """Our generator, read from a file; see `processes.py` for what is returned. A run is named by its batch."""
    from fvq_jax import Generator

    generator = Generator.from_pretrained(path, dtype=dtype)

    def sample(batch: int) -> Callable[[], np.ndarray]:
        labels = np.arange(batch) % classes
        return lambda: generator.sample_codes(labels, seed=0, guidance=guidance)

    return lambda: {"ready": lambda: None} | {str(batch): sample(batch) for batch in batches}


def write_weights(shape: llama.Shape, path: Path) -> None:
    """Random weights of our network in a published file."""
    from fvq_jax.interop.gpt_checkpoint import write_gpt
    from fvq_jax.models.gpt import GPT

    rng = np.random.default_rng(0)
    net = GPT(shape.vocab, shape.classes, shape.grid, shape.layers, shape.width, shape.heads)
    n, d, f = shape.layers, shape.width, shape.hidden

    def normal(*sizes: int) -> np.ndarray:
        return np.float32(0.02) * rng.standard_normal(sizes, np.float32)

    layers = {"wqkv": normal(n, d, 3 * d), "wo": normal(n, d, d)}
    layers |= {"w1": normal(n, d, f), "w3": normal(n, d, f), "w2": normal(n, f, d)}
    layers |= {name: np.ones((n, d), np.float32) for name in ("attention_norm", "ffn_norm")}
    tables = {"cls_embedding": normal(shape.classes + 1, d), "tok_embedding": normal(shape.vocab, d)}
    params = {**tables, "layers": layers, "norm": np.ones(d, np.float32), "output": normal(shape.vocab, d)}
    write_gpt(path, net, params)


class Rates:
    """Measures the machine's rates whenever it is asked to, with JAX and PyTorch, and keeps the highest ones."""

    def __init__(self, dtype: str):
        frameworks = ["jax", *(["torch"] if find_spec("torch") else [])]
        self._workers = [Worker(framework, limits.load, framework, dtype) for framework in frameworks]
        self._measured: list[dict[str, float]] = []

    def measure(self) -> None:
        """Measures once with each."""
        self._measured += [{name: worker.run(name).answer for name in limits.RATES} for worker in self._workers]

    def highest(self) -> dict[str, float]:
        """A limit is what the machine can do, not what one library did at one time."""
        return {name: max(rates[name] for rates in self._measured) for name in limits.RATES}

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()


def compare(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One row per batch and method, the methods alternating; those of a batch come once it is measured."""
    shape, guided = shape_of(args), 2 if args.guidance > 1 else 1
    write_weights(shape, folder / "weights.safetensors")
    peer = (shape, args.dtype)
    rest = (args.batches, args.guidance)
    programs = {
        "fvq_jax": ("jax", load_jax, str(folder / "weights.safetensors"), args.classes, args.dtype, *rest),
        "transformers": ("torch", llama.load_sampling, *peer, False, *rest),
        "transformers_compiled": ("torch", llama.load_sampling, *peer, True, *rest),
    }
    rates = Rates(args.dtype)
    rates.measure()
    workers, status = {}, dict.fromkeys(args.methods, "")
    for method in args.methods:
        if method != "fvq_jax" and (reason := missing()):
            status[method] = reason
            continue
        try:
            workers[method] = Worker(*programs[method])
        except DoesNotFitError as error:
            status[method] = str(error)
        except RuntimeError as error:
            status[method] = f"failed: {error}"
    for batch in args.batches:
        mine = {}
        for method in list(workers):
            try:
                mine[method] = workers[method].run(str(batch)).seconds
            except DoesNotFitError as error:
                workers.pop(method).close()
                status[method] = str(error)
            except RuntimeError as error:
                workers.pop(method).close()
                status[method] = f"failed: {error}"
        seconds = alternate(workers, [str(batch)], args.rounds, args.budget)
        rates.measure()
        found = rates.highest()
        bound, bound_by = limits.limit(shape, args.dtype, batch, guided, found)
        shared = {"size": shape.size, "vocab": shape.vocab, "tokens": shape.tokens, "dtype": args.dtype}
        shared |= {"guidance": args.guidance, "batch": batch, **machine()}
        shared |= {"memory_gb_per_second": round(found["memory_bytes_per_second"] / 1e9, 1)}
        shared |= {"matmul_gflops": round(found["operations_per_second"] / 1e9, 1)}
        shared |= {"bound": bound_by, "limit_images_per_second": round(bound, 4)}
        for method in args.methods:
            row = {"method": method, "status": status[method], **shared}
            if method in workers:
                taken = seconds[method, str(batch)]
                row["seconds"] = round(statistics.median(taken), 4)
                row["images_per_second"] = round(batch / statistics.median(taken), 4)
                row["of_limit"] = round(row["images_per_second"] / bound, 4)
                row["first_seconds"] = round(mine[method], 2)
                if "fvq_jax" in workers:
                    row["speedup"] = round(median_ratio(taken, seconds["fvq_jax", str(batch)]), 3)
                row["peak_mib"] = round(workers[method].peak())
            yield row
    for worker in workers.values():
        worker.close()
    rates.close()


def main(argv: list[str] | None = None) -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,64", help="images at once (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=1.75, help="above 1: two rows an image (default: %(default)s)"
    )
    add_shape(parser)
    args = finish(parser, argv)
    args.batches = [int(batch) for batch in args.batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_rows(compare(args, Path(folder)), COLUMNS, args.markdown)


if __name__ == "__main__":
    main()
