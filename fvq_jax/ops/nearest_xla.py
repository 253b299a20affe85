"""The search as an XLA program: a scan over blocks of codes, for every platform without a program of its own.

Called by `ops/nearest.py`, which says what a score is and turns candidates into codes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fvq_jax.ops.split_matmul import join, multiply_parts
from fvq_jax.ops.vectors import l2_normalize

BLOCK_SIZE = 512  # codes per block: 16 MiB of scores for 8,192 tokens


def candidates(
    query: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    bias: Float[Array, "k"],
    *,
    normalize: bool,
    precision: str,
    classes: int,
    block_size: int | None,
) -> tuple[Float[Array, "n c"], Int[Array, "n c"]]:
    """Finds, for every token, the smallest score in each of `classes` sets of codes, and the code that has it.

    Code i of a block belongs to set i % classes. Among equal scores the lowest index is kept. The largest temporary is
    [n, block_size]; the codebook is read block by block and never copied.
    """
    left, score = scores_of_blocks(query, codebook, center, bias, normalize=normalize, precision=precision)
    size = min(BLOCK_SIZE if block_size is None else block_size, len(codebook))
    classes = min(classes, size)
    size -= size % classes
    # On a CPU, XLA vectorises only minima of floating-point numbers: argmin or minima of integers take far longer.
    chunk = jnp.arange(0, size, classes, dtype=jnp.float32)

    def block_minimum(start):
        scores = score(left, start, size).reshape(-1, size // classes, classes)
        low = scores.min(axis=1)
        first = jnp.where(scores == low[:, None], chunk[None, :, None], chunk[-1]).min(axis=1)
        return low, start + first.astype(jnp.int32) + jnp.arange(classes, dtype=jnp.int32)[None]

    def step(best, start):
        low, index = block_minimum(start)
        closer = low < best[0]  # strictly: the earlier block keeps a tie
        return (jnp.where(closer, low, best[0]), jnp.where(closer, index, best[1])), None

    starts = block_starts(len(codebook), size)
    return jax.lax.scan(step, block_minimum(starts[0]), starts[1:])[0]


def uncounted_share(k: int) -> float:
    """The share of the products with k codes that XLA's count of flops leaves out: of the loop it counts one block."""
    return 1 - min(1.0, 2 * BLOCK_SIZE / k)


def scores_of_blocks(
    query: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    bias: Float[Array, "k"],
    *,
    normalize: bool,
    precision: str,
) -> tuple[Float[Array, "n c"], Callable[[Array, Array, int], Array]]:
    """The queries as the scores need them, and a function that makes the scores of some of them with a block of codes.

    The function takes queries [m, c], the block's first code and its size, and returns float32 [m, size].
    """
    exact = precision == "highest"
    # If exact, the bias is one more dimension: product and sum in one pass over the scores.
    left = _with_column(query, jnp.ones(query.shape[0])) if exact else join(query, precision, "left")

    def score(queries, start, size):
        codes = jax.lax.dynamic_slice_in_dim(codebook, start, size).astype(jnp.float32)
        codes = (l2_normalize(codes) if normalize else codes) - center[None]
        block_bias = jax.lax.dynamic_slice_in_dim(bias, start, size)
        if exact:
            return multiply_parts(queries, _with_column(codes, block_bias))
        return multiply_parts(queries, join(codes, precision, "right")) + block_bias[None]

    return left, score


def block_starts(k: int, size: int) -> Int[Array, "blocks"]:
    """Where blocks start. The last one has full size too, so it may visit some codes of the block before it again."""
    return jnp.minimum(jnp.arange(0, k, size, dtype=jnp.int32), k - size)


def _with_column(x, column):
    return jnp.concatenate([x, column[:, None]], axis=1)
