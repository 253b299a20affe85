"""Nearest-code search: which code is closest to each latent, without ever building [tokens, codes].

Pure functions of arrays on one device; `ops/sharded_codebook.py` runs the same scan on the rows that each
device holds.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_SIZE = 1024  # codes per block: 32 MiB of scores for 8,192 tokens


def l2_normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Scales every vector to unit length; a vector shorter than 1e-12 is divided by 1e-12 (no NaN)."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
    return x / norm


def nearest_code(
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    *,
    block_size: int | None = None,
    l2_normalize: bool = False,
) -> Int[Array, "n"]:
    """For every latent the index of the code at the smallest Euclidean distance.

    Codes are visited in blocks, so the largest temporary is [n, block_size] (default 1,024) in float32. Scores
    are |e - m|^2 - 2 (z - m).(e - m) with m the mean code: the shift leaves distances as they are and keeps
    digits when codes lie close together far from the origin, as bridged codes do early in training. Everything
    runs in float32 at HIGHEST precision, because a TPU multiplies in bfloat16 by default and then picks wrong
    codes.

    Args:
      z: latents, float32 or bfloat16.
      codebook: the table that is searched.
      block_size: codes per block; any positive number, k need not be a multiple of it.
      l2_normalize: compare directions: both sides are scaled to unit length first.

    Returns:
      int32 [n]. Ties go to the lowest index. No gradient.

    Raises:
      ValueError: block_size below 1.

    Source: arXiv 1711.00937, Eq. 1.
    """
    z, codebook = prepare(z, codebook, l2_normalize)
    return scan_blocks(z, codebook, codebook.mean(axis=0), block_size)[1]


def prepare(
    z: Float[Array, "n d"], codebook: Float[Array, "k d"], normalize: bool
) -> tuple[Float[Array, "n d"], Float[Array, "k d"]]:
    """Both sides as the scan wants them: constants in float32, of unit length if `normalize`."""
    z = jax.lax.stop_gradient(z).astype(jnp.float32)
    codebook = jax.lax.stop_gradient(codebook).astype(jnp.float32)
    return (l2_normalize(z), l2_normalize(codebook)) if normalize else (z, codebook)


def scan_blocks(
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    block_size: int | None = None,
) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    """The smallest score and its index for every latent; scores with the same `center` can be compared.

    Takes what `prepare` returns. A score is the squared distance less |z - center|^2, which no choice of code
    changes.
    """
    block_size = BLOCK_SIZE if block_size is None else block_size
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    k, d = codebook.shape
    block_size = min(block_size, k)
    blocks = -(-k // block_size)
    z, codebook = z - center[None], codebook - center[None]
    squared_norm = jnp.sum(codebook * codebook, axis=1)
    padding = blocks * block_size - k
    codebook = jnp.pad(codebook, ((0, padding), (0, 0))).reshape(blocks, block_size, d)
    # A padded code is infinitely far away.
    squared_norm = jnp.pad(squared_norm, (0, padding), constant_values=jnp.inf).reshape(blocks, block_size)
    column = jnp.arange(block_size, dtype=jnp.int32)

    def block_minimum(start, codes, squared_norm):
        product = jnp.matmul(z, codes.T, precision=jax.lax.Precision.HIGHEST)
        score = squared_norm[None] - 2 * product
        low = score.min(axis=1)
        # "min, then where" is what XLA vectorises; its argmin keeps pairs and is several times slower on a CPU.
        index = jnp.where(score == low[:, None], column[None], block_size - 1).min(axis=1)
        return low, start + index

    def step(best, block):
        low, index = block_minimum(*block)
        closer = low < best[0]  # strictly: the earlier block keeps a tie
        return (jnp.where(closer, low, best[0]), jnp.where(closer, index, best[1])), None

    starts = jnp.arange(blocks, dtype=jnp.int32) * block_size
    first = block_minimum(starts[0], codebook[0], squared_norm[0])
    if blocks == 1:
        return first
    best, _ = jax.lax.scan(step, first, (starts[1:], codebook[1:], squared_norm[1:]))
    return best
