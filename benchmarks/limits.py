"""How fast a machine could sample: its rates of copying and of multiplying matrices, measured, and the bound they set.

Every step of decoding reads all weights once, and for every row the keys and values before it. So images per second are
bounded by the memory's rate over those bytes, and by the rate of products over the operations. Nothing is assumed to
stay in a cache of the processor.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.llama import Shape

BYTES = {"float32": 4, "bfloat16": 2}
RATES = ("copy_bytes_per_second", "operations_per_second")
COPIED = 2**28  # bytes; far more than caches hold


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
    memory = batch * rates["copy_bytes_per_second"] / bytes_of_batch(shape, dtype, batch, rows)
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
    long = jnp.zeros(COPIED // 4, jnp.float32)
    side = jnp.ones((_side(cpu),) * 2, dtype)
    negative, product = jax.jit(lambda x: -x), jax.jit(lambda x: x @ x)
    return _rates(
        [lambda: jax.block_until_ready(negative(long)), *([_copy_in_threads()] if cpu else [])],
        lambda: jax.block_until_ready(product(side)),
        len(side),
    )


def _of_torch(dtype: str) -> dict[str, Callable]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    long = torch.zeros(COPIED // 4, device=device)
    target = torch.empty_like(long)
    side = torch.ones((_side(device.type == "cpu"),) * 2, dtype=getattr(torch, dtype), device=device)

    def finished(value: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _rates([lambda: finished(target.copy_(long))], lambda: finished(side @ side), len(side))


def _rates(copies: list[Callable], product: Callable, side: int) -> dict[str, Callable]:
    def copy() -> float:
        return 2 * COPIED / min(map(_seconds, copies))  # as many bytes are read as written

    return dict(zip(RATES, (copy, lambda: 2 * side**3 / _seconds(product)), strict=True))


def _copy_in_threads() -> Callable[[], None]:
    """numpy's copy, one part per core: it writes past the caches."""
    import os

    cores = len(os.sched_getaffinity(0))
    source, target = np.zeros(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    parts = [slice(start, start + COPIED // cores) for start in range(0, COPIED, COPIED // cores)]
    pool = ThreadPoolExecutor(cores)
    return lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts)) and None


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
