"""The search as an XLA program: a scan over blocks of codes, for every platform without a kernel of its own.

Called by `ops/nearest.py`, which says what a score is and turns candidates into codes.
"""

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
    k = codebook.shape[0]
    block_size = min(BLOCK_SIZE if block_size is None else block_size, k)
    classes = min(classes, block_size)
    block_size -= block_size % classes
    exact = precision == "highest"
    # If exact, the bias is one more dimension: product and sum in one pass over the scores.
    left = _with_column(query, jnp.ones(query.shape[0])) if exact else join(query, precision, "left")
    # On a CPU, XLA vectorises only minima of floating-point numbers: argmin or minima of integers take far longer.
    chunk = jnp.arange(0, block_size, classes, dtype=jnp.float32)

    def block_minimum(start):
        codes = jax.lax.dynamic_slice_in_dim(codebook, start, block_size).astype(jnp.float32)
        codes = (l2_normalize(codes) if normalize else codes) - center[None]
        block_bias = jax.lax.dynamic_slice_in_dim(bias, start, block_size)
        if exact:
            score = multiply_parts(left, _with_column(codes, block_bias))
        else:
            score = multiply_parts(left, join(codes, precision, "right")) + block_bias[None]
        score = score.reshape(-1, block_size // classes, classes)
        low = score.min(axis=1)
        first = jnp.where(score == low[:, None], chunk[None, :, None], chunk[-1]).min(axis=1)
        return low, start + first.astype(jnp.int32) + jnp.arange(classes, dtype=jnp.int32)[None]

    def step(best, start):
        low, index = block_minimum(start)
        closer = low < best[0]  # strictly: the earlier block keeps a tie
        return (jnp.where(closer, low, best[0]), jnp.where(closer, index, best[1])), None

    # The last block has full size too, so it may visit some codes of the block before it again.
    starts = jnp.minimum(jnp.arange(0, k, block_size, dtype=jnp.int32), k - block_size)
    first = block_minimum(starts[0])
    if len(starts) == 1:
        return first
    best, _ = jax.lax.scan(step, first, starts[1:])
    return best


def _with_column(x, column):
    return jnp.concatenate([x, column[:, None]], axis=1)
