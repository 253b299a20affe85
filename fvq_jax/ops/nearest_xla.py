"""The search as an XLA program: loops over blocks of codes, for every platform without a kernel of its own.

Called by `ops/nearest.py`, which says what a score is and turns candidates into codes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fvq_jax.ops.split_matmul import join, multiply_parts
from fvq_jax.ops.vectors import l2_normalize

TOKENS = 4096  # compared with a block at a time, so that their scores stay in a core's cache
READ_AGAIN = 2**20  # numbers of codes that are read again at a time: 4 MiB
SET_BLOCK = 512  # codes per block where there are sets: 16 MiB of scores for 8,192 tokens


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

    Code i of a block belongs to set i % classes. Among equal scores the lowest index is kept. The codebook is read
    block by block and never copied. The largest temporary is [min(n, TOKENS), block size], or [n, block size] if there
    are several sets.
    """
    exact = precision == "highest"
    # If exact, the bias is one more dimension: product and sum in one pass over the scores.
    left = _with_column(query, jnp.ones(query.shape[0])) if exact else join(query, precision, "left")

    def score(queries, start, size):
        """Of queries with the codes of a block."""
        codes = jax.lax.dynamic_slice_in_dim(codebook, start, size).astype(jnp.float32)
        codes = (l2_normalize(codes) if normalize else codes) - center[None]
        block_bias = jax.lax.dynamic_slice_in_dim(bias, start, size)
        if exact:
            return multiply_parts(queries, _with_column(codes, block_bias))
        return multiply_parts(queries, join(codes, precision, "right")) + block_bias[None]

    k, d = codebook.shape
    if classes == 1:
        low, index = _nearest(score, left, _starts(k, block_size or default_block_size(k, d)), d)
        return low[:, None], index[:, None]
    return _best_of_sets(score, left, _starts(k, block_size or SET_BLOCK, classes), classes)


def default_block_size(k: int, d: int) -> int:
    """Codes in a block, 16 to 128: at most 32 KiB and a 64th of all, since every token reads one block again."""
    return min(k, max(16, min(128, 8192 // d, k // 64)))


def uncounted_share(n: int, k: int, d: int) -> float:
    """The share of the products of n tokens and k codes that XLA's count of flops leaves out.

    Of a loop it counts the body once; outside the loops over codes and tokens are the first block and what remains.
    """
    size = default_block_size(k, d)
    whole, rest = divmod(n, TOKENS)
    counted = min(k, 2 * size) * (rest + (TOKENS if whole else 0))
    return 1 - min(1.0, counted / (n * k))


def _starts(k, size, multiple=1):
    """(size of blocks, where they start): the last one has full size too, so it may visit some codes again."""
    size = min(size, k)
    size -= size % min(multiple, size)
    return size, jnp.minimum(jnp.arange(0, k, size, dtype=jnp.int32), k - size)


def _nearest(score, queries, blocks, d):
    """For every query the smallest score [n] and its code [n]: its block first, then the code in that block.

    XLA's library for CPUs reads the scores once if only their minima are asked for. Where in the block each minimum was
    would take several times as long to know.
    """
    size, starts = blocks

    def block_of(query):
        def lowest(start):
            return score(query[None], start, size)[0].min()

        def step(best, start):
            low = lowest(start)
            closer = low < best[0]  # strictly: the earlier block keeps a tie
            return (jnp.where(closer, low, best[0]), jnp.where(closer, start, best[1])), None

        low = lowest(starts[0])
        start = starts[0] + jnp.zeros_like(low, jnp.int32)  # under `shard_map` it varies over devices as `low` does
        (_, start), _ = jax.lax.scan(step, (low, start), starts[1:])
        return start

    def code_in(block):
        query, start = block
        scores = score(query[None], start, size)[0]
        return scores.min(), start + jnp.argmin(scores).astype(jnp.int32)

    start = jax.lax.map(block_of, queries, batch_size=TOKENS)
    return jax.lax.map(code_in, (queries, start), batch_size=max(1, READ_AGAIN // (size * d)))


def _best_of_sets(score, queries, blocks, classes):
    """For every query the smallest score of each set [n, c] and its code [n, c]."""
    size, starts = blocks
    classes = min(classes, size)
    # On a CPU, XLA vectorises only minima of floating-point numbers: argmin or minima of integers take far longer.
    chunk = jnp.arange(0, size, classes, dtype=jnp.float32)

    def block_minimum(start):
        scores = score(queries, start, size).reshape(-1, size // classes, classes)
        low = scores.min(axis=1)
        first = jnp.where(scores == low[:, None], chunk[None, :, None], chunk[-1]).min(axis=1)
        return low, start + first.astype(jnp.int32) + jnp.arange(classes, dtype=jnp.int32)[None]

    def step(best, start):
        low, index = block_minimum(start)
        closer = low < best[0]  # strictly: the earlier block keeps a tie
        return (jnp.where(closer, low, best[0]), jnp.where(closer, index, best[1])), None

    return jax.lax.scan(step, block_minimum(starts[0]), starts[1:])[0]


def _with_column(x, column):
    return jnp.concatenate([x, column[:, None]], axis=1)
