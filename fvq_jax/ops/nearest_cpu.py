"""The search on a CPU: first the block of codes that has the nearest one, then the code.

Where only the minimum of each row of a product is asked for, XLA's library for CPUs reads every score once. To ask in
the same pass where the minimum was takes several times as long. Called by `ops/nearest.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fvq_jax.ops.nearest_xla import block_starts, scores_of_blocks

MOST_DIMENSIONS = 64  # of codes; with more the products take nearly all of the time, and the scan is faster
TOKENS = 4096  # compared with a block at a time, so that their scores stay in a core's cache
VECTOR = 16  # numbers; in products that are no multiple of it wide, equal codes may have unequal scores
READ_AGAIN = 2**20  # numbers, codes x dimensions, that are read again at a time: 4 MiB


def candidates(
    query: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    bias: Float[Array, "k"],
    *,
    normalize: bool,
    precision: str,
    block_size: int | None,
) -> tuple[Float[Array, "n 1"], Int[Array, "n 1"]]:
    """Finds the smallest score of every token, and the code that has it; among equal scores the lowest index.

    Temporaries are the scores, [min(n, TOKENS), block_size], and READ_AGAIN numbers of codes.
    """
    k, d = codebook.shape
    size = whole_vectors(default_block_size(k, d) if block_size is None else block_size, k)
    queries, score = scores_of_blocks(query, codebook, center, bias, normalize=normalize, precision=precision)
    starts = block_starts(k, size)

    def start_of_block(query):
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

    def code_in_block(pair):
        query, start = pair
        scores = score(query[None], start, size)[0]
        return scores.min(), start + jnp.argmin(scores).astype(jnp.int32)

    start = jax.lax.map(start_of_block, queries, batch_size=TOKENS)
    low, index = jax.lax.map(code_in_block, (queries, start), batch_size=max(1, READ_AGAIN // (size * d)))
    return low[:, None], index[:, None]


def default_block_size(k: int, d: int) -> int:
    """Codes in a block, which every token reads again: what 32 KiB hold, at most 128 and a 64th of all, at least 16."""
    return max(VECTOR, min(128, 8192 // d, k // 64))


def whole_vectors(size: int, k: int) -> int:
    """The block size as it is taken: a multiple of VECTOR, but not above k codes."""
    return min(-(-size // VECTOR), k // VECTOR) * VECTOR or k


def uncounted_share(n: int, k: int, d: int) -> float:
    """The share of the products of n tokens and k codes that XLA's count of flops leaves out in a search.

    It counts two blocks, the first one and that of the loop, for the tokens beyond a multiple of TOKENS and for TOKENS
    more if there are as many. That it counts the block that is read again too is left out here.
    """
    size = whole_vectors(default_block_size(k, d), k)
    whole, rest = divmod(n, TOKENS)
    counted = min(k, 2 * size) * (rest + (TOKENS if whole else 0))
    return 1 - min(1.0, counted / (n * k))
