"""The search on one GPU or TPU: our kernel, XLA's scan and the matrix product of the same sizes, timed in one process.

  python benchmarks/chip_search.py --codes=262144 --markdown

`nearest_code.py` compares programs and their memory, each in a process of its own. Here one call takes milliseconds, so
many calls are queued and waited for together, the product in turn with each search; figures are medians over rounds,
ratios within each round. `matmul` multiplies bfloat16 matrices and writes all scores, [tokens, codes], in bfloat16.
PyTorch's `addmm` and argmin, in float32, run afterwards in a process of their own.

One JSON object per line, as soon as it is known: `matmul_rate` is the speed over the product's speed, `over_scan`
that over the scan's at the same precision; `tflops` counts
2 x tokens x codes x dim, whatever the precision; `agreement` is the share of the first 512 tokens whose code float64
arithmetic on the host also picks; `program_mib` is what XLA planned beyond the arguments.
"""

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import nearest_code
from benchmarks.processes import MIB, DoesNotFitError, Worker, alternate, machine, median_ratio, write_rows

# Our kernel after the scan at the same precision; at `highest` it comes last, since compiling it may take longest.
PRECISIONS = ("bf16", "bf16_rescored", "bf16_3x", "highest")
METHODS = ("matmul", *(f"{kind}:{name}" for name in PRECISIONS for kind in ("scan", "fvq_jax")))
CHECKED = 512  # tokens that are searched in float64 too
COLUMNS = {
    "codes": "codes",
    "tokens": "tokens",
    "method": "method",
    "milliseconds": "ms",
    "tflops": "Tflop/s",
    "matmul_rate": "of the matmul's rate",
    "over_scan": "speed over the scan's",
    "agreement": "as float64",
    "program_mib": "MiB",
    "status": "",
}


def load(folder: str, rounds: int, least: float) -> Any:
    """All methods of JAX; each run returns (row, codes of the first tokens). See `processes.py` for what is returned.

    Args:
      folder: has the arrays of `nearest_code.inputs`.
      rounds: timed rounds of every method.
      least: seconds of a round, at least.
    """
    import jax
    import jax.numpy as jnp

    from fvq_jax.ops.nearest import nearest_code as search

    z, codebook = (jax.device_put(array) for array in nearest_code.inputs(folder))
    halves = z.astype(jnp.bfloat16), codebook.astype(jnp.bfloat16)
    operations = 2 * z.shape[0] * codebook.shape[0] * z.shape[1]

    def compiled(method):
        kind, _, precision = method.partition(":")
        if kind == "matmul":
            function, arguments = (lambda a, b: a @ b.T), halves
        else:
            how = {"precision": precision, "implementation": "xla" if kind == "scan" else "auto"}
            function, arguments = (lambda a, b: search(a, b, **how)), (z, codebook)
        began = time.monotonic()
        program = jax.jit(function).lower(*arguments).compile()
        memory = program.memory_analysis()
        planned = memory.temp_size_in_bytes + memory.output_size_in_bytes
        facts = {"compile_seconds": round(time.monotonic() - began, 1), "program_mib": round(planned / MIB)}
        return lambda: program(*arguments), facts

    def seconds_of(run, times):
        """Of one call, when that many are queued; a result is dropped before the next call."""
        result, began = None, time.perf_counter()
        for _ in range(times):
            result = None
            result = run()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / times

    def calls(run):
        jax.block_until_ready(run())
        return max(1, min(50, round(least / seconds_of(run, 1))))

    product: list[Any] = []  # of the matrices and how often it is called in a round, once it has been measured

    def measure(method):
        run, facts = compiled(method)
        times, mine, others = calls(run), [], []
        for _ in range(rounds):
            others += [seconds_of(*product)] if product else []
            mine.append(seconds_of(run, times))
        taken = statistics.median(mine)
        row = facts | {"milliseconds": round(1e3 * taken, 4), "tflops": round(operations / taken / 1e12, 3)}
        row |= {"calls": times, "device": jax.devices()[0].device_kind}
        if others:
            row["matmul_rate"] = round(median_ratio(others, mine), 3)
        if method == "matmul":
            product[:] = run, times
            return row, None
        return row, np.asarray(run()[:CHECKED])

    def guarded(method) -> Callable[[], tuple[dict, Any]]:
        def run():
            try:
                return measure(method)
            except Exception as error:  # one method that fails must not cost the others
                traceback.print_exc()
                return {"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}, None

        return run

    return lambda: {"ready": lambda: None} | {method: guarded(method) for method in METHODS}


def compare(tokens: int, codes: int, dim: int, rounds: int, least: float) -> Iterator[dict]:
    """One row per method, as soon as it is known; for `rounds` and `least` see `load`."""
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((tokens, dim), np.float32), rng.standard_normal((codes, dim), np.float32)
    shared = {"tokens": tokens, "codes": codes, "dim": dim, **machine()}
    reference = nearest_code.float64_codes(z[:CHECKED], codebook)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/z.npy", z)
        np.save(f"{folder}/codebook.npy", codebook)
        worker, scanned = Worker("jax", load, folder, rounds, least), {}
        for method in METHODS:
            row, found = worker.run(method).answer
            row = {"method": method, "status": "", **shared} | row
            kind, _, precision = method.partition(":")
            if kind == "scan":
                scanned[precision] = row.get("milliseconds")
            elif scanned.get(precision) and "milliseconds" in row:
                row["over_scan"] = round(scanned[precision] / row["milliseconds"], 3)
            if found is not None:
                row["agreement"] = _agreement(found, reference)
            yield row
        worker.close()
        yield {"method": "torch_addmm", "status": "", **shared} | _torch(folder, rounds, reference)


def _torch(folder: str, rounds: int, reference: np.ndarray) -> dict:
    """What the row of PyTorch says beside the sizes."""
    if find_spec("torch") is None:
        return {"status": "torch is not installed"}
    try:
        worker = Worker("torch", nearest_code.load_torch, "torch_addmm", folder)
        taken = alternate({"it": worker}, ["search"], rounds)["it", "search"]
        row = {"milliseconds": round(1e3 * statistics.median(taken), 4), "program_mib": round(worker.peak())}
        row["agreement"] = _agreement(worker.run("search").answer, reference)
        worker.close()
    except DoesNotFitError as error:
        return {"status": str(error)}
    return row


def _agreement(found: np.ndarray, reference: np.ndarray) -> float:
    return round(float((found[: len(reference)] == reference).mean()), 4)


def main() -> None:
    """Reads the sizes and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=262144, help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--least", type=float, default=0.1, help="seconds of a round (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="a table after the rows")
    args = parser.parse_args()
    write_rows(compare(args.tokens, args.codes, args.dim, args.rounds, args.least), COLUMNS, args.markdown)


if __name__ == "__main__":
    main()
