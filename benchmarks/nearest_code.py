"""Search time and memory of `fvq_jax.ops.nearest` beside the same search by others, on whatever device there is.

  python benchmarks/nearest_code.py --codes=16384,65536,262144,1048576 --dims=256,8 --markdown

Others: the published formula, which builds the whole distance matrix, under `jax.jit` and, as it was published, in
PyTorch; PyTorch's `cdist` and `addmm`, each with argmin; VectorQuantize of vector-quantize-pytorch in eval mode;
faiss-cpu's exact index (IndexFlatL2; filling it is not timed, its copy of the codes counts as `held_mib`). The
method `matmul`, if named, is the bfloat16 matrix product of the same sizes; `matmul_rate` is the speed over its speed.
Every method runs in a process of its own, all in turn.

One JSON object per line: median seconds; `ours_over_this`, the median over rounds of our seconds over these; the
memory taken beyond latents and codebook; the share of the tokens whose code float64 arithmetic also picks.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.processes import DoesNotFitError, Worker, alternate, machine, median_ratio, write_rows

# method -> the framework it runs in, the package it needs
METHODS = {
    "fvq_jax": ("jax", "jax"),
    "jax_matrix": ("jax", "jax"),
    "torch_matrix": ("torch", "torch"),
    "torch_cdist": ("torch", "torch"),
    "torch_addmm": ("torch", "torch"),
    "vector_quantize_pytorch": ("torch", "vector_quantize_pytorch"),
    "faiss": ("faiss", "faiss"),
    "matmul": ("jax", "jax"),
}
COLUMNS = {
    "codes": "codes",
    "dim": "dim",
    "method": "method",
    "seconds": "seconds",
    "ours_over_this": "ours / this",
    "held_mib": "held MiB",
    "extra_mib": "extra MiB",
    "agreement": "as float64",
    "matmul_rate": "of the matmul's rate",
    "status": "",
}


def load_jax(method: str, folder: str) -> Any:
    """`fvq_jax`, `fvq_jax:PRECISION`, `fvq_jax:tree`, `jax_matrix` or `matmul`; see `processes.py` for the result."""
    import jax
    import jax.numpy as jnp

    from fvq_jax.ops.nearest import nearest_code

    def ours(z, codebook):
        _, _, way = method.partition(":")
        options = {"implementation": "tree"} if way == "tree" else {"precision": way or "highest"}
        return nearest_code(z, codebook, **options)

    def matrix(z, codebook):
        distance = (z**2).sum(1, keepdims=True) + (codebook**2).sum(1)[None] - 2 * z @ codebook.T
        return jnp.argmin(distance, axis=1)

    def product(z, codebook):
        return z @ codebook.T

    z, codebook = (jax.device_put(array) for array in inputs(folder))
    if method == "matmul":
        z, codebook = z.astype(jnp.bfloat16), codebook.astype(jnp.bfloat16)
    function = {"jax_matrix": matrix, "matmul": product}.get(method, ours)
    compiled = jax.jit(function).lower(z, codebook).compile()

    def search():
        found = jax.block_until_ready(compiled(z, codebook))
        return None if method == "matmul" else np.asarray(found)

    return lambda: {"search": search, "device": lambda: jax.devices()[0].device_kind}


def load_torch(method: str, folder: str) -> Any:
    """The PyTorch methods."""
    import torch

    if method == "vector_quantize_pytorch":
        import vector_quantize_pytorch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    z, codebook = (torch.from_numpy(array).to(device) for array in inputs(folder))

    def matrix():
        product = torch.einsum("nd,dk->nk", z, codebook.T)
        return (z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * product).argmin(1)

    def cdist():
        return torch.cdist(z[None], codebook[None])[0].argmin(1)

    def addmm():
        return torch.addmm(codebook.square().sum(1), z, codebook.T, alpha=-2).argmin(1)

    def build():
        find = {"torch_matrix": matrix, "torch_cdist": cdist, "torch_addmm": addmm}.get(method)
        if find is None:
            quantizer = vector_quantize_pytorch.VectorQuantize(dim=z.shape[1], codebook_size=len(codebook))
            quantizer.to(device).eval().codebook = codebook

            def find():
                return quantizer(z[None])[1][0]

        @torch.inference_mode()
        def search():
            return find().cpu().numpy()  # the copy to the host waits for the result

        return {"search": search, "device": lambda: device}

    return build


def load_faiss(method: str, folder: str) -> Any:
    """FAISS, on all cores of the CPU."""
    import faiss

    z, codebook = inputs(folder)

    def build():
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook)
        return {"search": lambda: index.search(z, 1)[1][:, 0], "device": lambda: "cpu"}

    return build


def inputs(folder: str) -> Iterator[np.ndarray]:
    """Latents and codebook. The files are mapped: all processes share one copy, and it is read before this returns."""
    for name in ("z", "codebook"):
        array = np.load(f"{folder}/{name}.npy", mmap_mode="c")
        array.sum()
        yield array


def float64_codes(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The nearest codes in double precision, block by block."""
    z, best, codes = z.astype(np.float64), np.full(len(z), np.inf), np.zeros(len(z), np.int64)
    for start in range(0, len(codebook), 16384):
        block = codebook[start : start + 16384].astype(np.float64)
        score = (block**2).sum(1) - 2 * z @ block.T
        lowest = score.argmin(1)
        low = score[np.arange(len(z)), lowest]
        codes = np.where(low < best, start + lowest, codes)
        best = np.minimum(low, best)
    return codes


def compare(methods: list[str], tokens: int, codes: int, dim: int, rounds: int, budget: float) -> list[dict]:
    """One row per method for one size, the methods alternating; the first is the one the others are compared with."""
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((tokens, dim), np.float32), rng.standard_normal((codes, dim), np.float32)
    reference = float64_codes(z, codebook)
    rows = {m: {"method": m, "status": "", "tokens": tokens, "codes": codes, "dim": dim, **machine()} for m in methods}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/z.npy", z)
        np.save(f"{folder}/codebook.npy", codebook)
        del z, codebook
        for method, row in rows.items():
            framework, package = METHODS[method.partition(":")[0]]
            if find_spec(package) is None:
                row["status"] = f"{package} is not installed"
                continue
            try:
                load = {"jax": load_jax, "torch": load_torch, "faiss": load_faiss}[framework]
                workers[method] = Worker(framework, load, method, folder)
            except DoesNotFitError as error:
                row["status"] = str(error)
        seconds = alternate(workers, ["search"], rounds, budget)
        for method, worker in workers.items():
            mine, row = seconds[method, "search"], rows[method]
            row["device"] = worker.run("device").answer
            row["seconds"] = round(statistics.median(mine), 4)
            if methods[0] in workers:
                row["ours_over_this"] = round(median_ratio(seconds[methods[0], "search"], mine), 3)
            row["held_mib"], row["extra_mib"] = round(worker.held), round(worker.peak())
            if method != "matmul":
                row["agreement"] = round(float((worker.run("search").answer == reference).mean()), 4)
            if "matmul" in workers:
                row["matmul_rate"] = round(median_ratio(seconds["matmul", "search"], mine), 3)
            worker.close()
    return list(rows.values())


def main() -> None:
    """Reads the sizes and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", default="16384,65536", help="codebook sizes")
    parser.add_argument("--dims", default="256", help="code dimensions")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--methods", default=",".join(METHODS).removesuffix(",matmul"), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--precisions", default="", help="of nearest_code, each one more method: bf16_3x,bf16,...")
    parser.add_argument("--tree", action="store_true", help="nearest_code by a k-d tree as one more method")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=90, help="seconds per size; at least two rounds are run")
    parser.add_argument("--markdown", action="store_true", help="a table after the rows")
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"unknown methods {', '.join(unknown)}: choose from {', '.join(METHODS)}")
    methods = args.methods.split(",") + [f"fvq_jax:{name}" for name in filter(None, args.precisions.split(","))]
    methods += ["fvq_jax:tree"] * args.tree
    sizes = [(codes, dim) for dim in map(int, args.dims.split(",")) for codes in map(int, args.codes.split(","))]
    found = (compare(methods, args.tokens, *size, args.rounds, args.budget) for size in sizes)
    write_rows(itertools.chain.from_iterable(found), COLUMNS, args.markdown)


if __name__ == "__main__":
    main()
