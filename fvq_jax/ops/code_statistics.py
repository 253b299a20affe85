"""Which codes are used, and how evenly: histogram, usage and perplexity.

A usage figure means nothing without the *window* of tokens it was counted over: even perfectly uniform use of
k codes hits only a fraction 1 - (1 - 1/k)^n of them with n tokens (63 % with 65,536 tokens and as many
codes). So these functions never hide a window. A caller counts the codes of a step with `code_histogram`,
adds the counts of as many steps, hosts or images as its window holds (histograms add, usages do not), and
names that window where it reports: `usage/batch`, `usage/window`, `usage/eval`. Keeping the sums and writing
them down is left to the training loop and to `fvq_jax.metrics`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

Codes = Int[jax.Array | np.ndarray, "..."]
Mask = Bool[jax.Array | np.ndarray, "..."]
Counts = Int[jax.Array | np.ndarray, "k"]


def code_histogram(codes: Codes, codebook_size: int, mask: Mask | None = None) -> Int32[jax.Array, "k"]:
    """How often each of the `codebook_size` codes occurs in `codes`; a count above 2^31 - 1 would overflow.

    A scatter-add: memory is that of codes and counts, never [tokens, k]. `mask` covers the leading axes of
    `codes` (for codes [b, h, w]: [b] drops padding images, [b, h, w] single tokens); where it is False
    nothing is counted. Codes outside 0..k-1 are not counted either, so a sum smaller than the number of
    tokens betrays them. Under `jit` with sharded codes the result is the histogram of the global array.
    ValueError if the mask's shape is not a prefix of that of the codes.
    """
    codes = jnp.asarray(codes)
    counted = (codes >= 0) & (codes < codebook_size)
    if mask is not None:
        if mask.shape != codes.shape[: mask.ndim]:
            raise ValueError(f"mask {mask.shape} must cover the leading axes of codes {codes.shape}")
        counted &= mask.reshape(mask.shape + (1,) * (codes.ndim - mask.ndim))
    index = jnp.where(counted, codes, codebook_size).reshape(-1)
    return jnp.zeros(codebook_size, jnp.int32).at[index].add(1, mode="drop")


def usage(counts: Counts) -> Float32[jax.Array, ""]:
    """Fraction (0..1) of the codes hit at least once in the window that `counts` were summed over."""
    return jnp.mean(jnp.asarray(counts) > 0, dtype=jnp.float32)


def perplexity(counts: Counts) -> Float32[jax.Array, ""]:
    """exp(entropy of the code frequencies) of the window: as diverse as that many equally frequent codes.

    Lies between 1 (one code) and the number of codes hit (all equally often); float32 rounding is clipped to
    these bounds. Codes never hit add 0; an empty window (all counts 0) gives 0.
    """
    weights = jnp.asarray(counts, jnp.float32)  # the counts of a long window may add up to more than an int32
    codes_hit = jnp.sum(weights > 0, dtype=jnp.float32)
    frequency = weights / jnp.maximum(jnp.sum(weights), 1.0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(frequency, frequency))
    return jnp.clip(jnp.exp(entropy), jnp.minimum(codes_hit, 1.0), codes_hit)
