"""How fast a machine could sample: the rates of its memory and of products of matrices, measured, and their bound.

Every step of decoding reads all weights once, and for every row the keys and values before it. So images per second are
bounded by the memory's rate over those bytes, and by the rate of products over the operations. Nothing is assumed to
stay in a cache of the processor. The memory's rate is the higher one of copying and of only reading.
"""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.llama import Shape

BYTES = {"float32": 4, "bfloat16": 2}
RATES = ("memory_bytes_per_second", "operations_per_second")
MOVED = 2**28  # bytes; far more than caches hold


def weights_read(shape: Shape) -> int:
    """Weights that one step of decoding reads: all but the tables of which it takes single rows."""
    d, f = shape.width, shape.hidden
    return shape.layers * (4 * d * d + 3 * d * f + 2 * d) + shape.vocab * d + d


def bytes_of_batch(shape: Shape, dtype: str, batch: int, rows: int) -> float:
    """Bytes read to sample a batch of images, each as `rows` rows (2 with guidance)."""
    t, size = shape.tokens, BYTES[dtype]
    keys_and_values = rows * batch * shape.layers * shape.width * size * t * (t + 1)
    return t * size * weights_read(shape) + keys_and_values


def operations_of_image(shape: Shape, rows: int) -> float:
    """Additions and multiplications to sample an image: of the weights, and of attention."""
    t = shape.tokens
    return rows * t * (2 * weights_read(shape) + 2 * shape.layers * shape.width * (t + 1))


def limit(shape: Shape, dtype: str, batch: int, rows: int, rates: dict[str, float]) -> tuple[float, str]:
    """Images per second that cannot be exceeded, and what bounds them: "memory" or "compute"."""
    memory = batch * rates["memory_bytes_per_second"] / bytes_of_batch(shape, dtype, batch, rows)
    compute = rates["operations_per_second"] / operations_of_image(shape, rows)
    return min((memory, "memory"), (compute, "compute"))


def load(framework: str, dtype: str) -> Any:
    """Measures the rates with JAX or PyTorch; a program for `processes.Worker`."""
    rates = {"jax": _of_jax, "torch": _of_torch}[framework](dtype)

    def build() -> dict[str, Callable]:
        return {"ready": lambda: None} | rates

    return build


def _of_jax(dtype: str) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    cpu = jax.default_backend() == "cpu"
    # Not zeros: of an array that was never written, every page is the same one, and lies in the cache.
    long = jnp.ones(MOVED // 4, jnp.float32)
    side = jnp.ones((_side(cpu),) * 2, dtype)
    negative, largest, product = jax.jit(lambda x: -x), jax.jit(jnp.max), jax.jit(lambda x: x @ x)
    moves = {lambda: jax.block_until_ready(negative(long)): 2, lambda: jax.block_until_ready(largest(long)): 1}
    return _rates(moves | (_in_threads() if cpu else {}), lambda: jax.block_until_ready(product(side)), len(side))


def _of_torch(dtype: str) -> dict[str, Callable]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    long = torch.ones(MOVED // 4, device=device)
    target = torch.empty_like(long)
    side = torch.ones((_side(device.type == "cpu"),) * 2, dtype=getattr(torch, dtype), device=device)

    def finished(value: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    moves = {lambda: finished(target.copy_(long)): 2, lambda: finished(long.max()): 1}
    return _rates(moves, lambda: finished(side @ side), len(side))


def _rates(moves: dict[Callable[[], Any], int], product: Callable, side: int) -> dict[str, Callable]:
    """`moves` go through `MOVED` bytes as many times as they say."""

    def memory() -> float:
        return max(times * MOVED / _seconds(move) for move, times in moves.items())

    return dict(zip(RATES, (memory, lambda: 2 * side**3 / _seconds(product)), strict=True))


def _in_threads() -> dict[Callable[[], Any], int]:
    """numpy's copy, which writes past the caches, and its maximum; one part per core."""
    cores = len(os.sched_getaffinity(0))
    source, target = np.ones(MOVED, np.uint8), np.ones(MOVED, np.uint8)
    parts = [slice(start, start + MOVED // cores) for start in range(0, MOVED, MOVED // cores)]
    pool = ThreadPoolExecutor(cores)
    return {
        lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts)): 2,
        lambda: list(pool.map(lambda part: source[part].max(), parts)): 1,
    }


def _seconds(program: Callable, times: int = 3) -> float:
    """The median of a few runs, after one that does not count."""
    program()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        program()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _side(cpu: bool) -> int:
    """Rows and columns of the matrices that are multiplied."""
    return 2048 if cpu else 8192
