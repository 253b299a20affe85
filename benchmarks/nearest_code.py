"""Search time and peak memory beside the formula that builds the whole distance matrix, and PyTorch's `cdist`.

  python benchmarks/nearest_code.py --codes=16384,65536 --dim=256 --tokens=2048

Every method runs in a process of its own (so that peak memory is its own), then all are timed in turn, repeatedly,
so that a machine whose speed drifts is the same for all. One JSON object per line: seconds (median), ratio to the
published formula in the same round, extra memory in MiB.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from importlib.util import find_spec

import numpy as np

METHODS = ["fvq_jax", "jax_matrix"] + (["torch_cdist"] if find_spec("torch") else [])


def make_search(method, z, codebook):
    """A function without arguments that searches and waits for the result."""
    if method == "torch_cdist":
        import torch

        a, b = torch.from_numpy(z), torch.from_numpy(codebook)
        return lambda: torch.cdist(a[None], b[None])[0].argmin(dim=1).numpy()
    import jax
    import jax.numpy as jnp

    from fvq_jax.ops.nearest import nearest_code

    def matrix(z, codebook):
        distance = (z**2).sum(1, keepdims=True) + (codebook**2).sum(1)[None] - 2 * z @ codebook.T
        return jnp.argmin(distance, axis=1)

    search = jax.jit(nearest_code if method == "fvq_jax" else matrix)
    a, b = jnp.asarray(z), jnp.asarray(codebook)
    return lambda: np.asarray(search(a, b))


def serve(method, tokens, codes, dim, pipe):
    """Child process: sets up, then answers every request with (seconds, extra MiB so far, agreement checksum)."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((tokens, dim), np.float32)
    codebook = rng.standard_normal((codes, dim), np.float32)
    make_search(method, z[:8], codebook[:8])()  # libraries are loaded before memory is counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    search = make_search(method, z, codebook)
    indices = search()  # compiles
    while pipe.recv():
        start = time.perf_counter()
        search()
        seconds = time.perf_counter() - start
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        pipe.send((seconds, extra, indices))
    pipe.close()


def compare(tokens, codes, dim, rounds):
    """Rows for one size, all methods alternating."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, answers = {}, [], {method: [] for method in METHODS}
    for method in METHODS:
        pipes[method], child = context.Pipe()
        processes.append(context.Process(target=serve, args=(method, tokens, codes, dim, child)))
        processes[-1].start()
    for _ in range(rounds):
        for method, pipe in pipes.items():
            pipe.send(True)
            answers[method].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    reference = answers["jax_matrix"]
    for method in METHODS:
        ratios = [mine[0] / other[0] for mine, other in zip(answers[method], reference, strict=True)]
        yield {
            "method": method,
            "tokens": tokens,
            "codes": codes,
            "dim": dim,
            "seconds": round(statistics.median(a[0] for a in answers[method]), 4),
            "ratio_to_matrix": round(statistics.median(ratios), 3),
            "extra_mib": round(answers[method][-1][1]),
            "same_codes": round(float((answers[method][0][2] == reference[0][2]).mean()), 6),
        }


def main():
    """Reads the sizes and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", default="16384,65536")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for codes in map(int, args.codes.split(",")):
        for row in compare(args.tokens, codes, args.dim, args.rounds):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
