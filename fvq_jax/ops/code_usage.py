"""Which codes are used, and how evenly: histogram, usage and perplexity.

A usage figure means nothing without the *window* of tokens it was counted over: even perfectly uniform use of
k codes hits only a fraction 1 - (1 - 1/k)^n of them with n tokens (63 % with 65,536 tokens and as many
codes). So no function here chooses a window. A caller counts the codes of a step with
`code_histogram`, adds the counts of all steps, hosts or images of its window (histograms can be added, usages
cannot), and names the window when it reports: `usage/batch` (one step), `usage/window` (the steps since the last log
line), `eval/usage` (a whole evaluation). `usage_if_uniform` says what an even use would show in a window. The training
loop and the evaluation keep the sums and report them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

Codes = Int[jax.Array | np.ndarray, "..."]
Mask = Bool[jax.Array | np.ndarray, "..."]
Counts = Int[jax.Array | np.ndarray, "k"]


def code_histogram(codes: Codes, codebook_size: int, mask: Mask | None = None) -> Int32[jax.Array, "k"]:
    """How often each of the `codebook_size` codes occurs in `codes`; a count above 2^31 - 1 would overflow.

    A scatter-add: it needs memory for codes and counts, never for [tokens, k]. `mask` covers the leading axes of
    `codes` (for codes [b, h, w]: [b] drops padding images, [b, h, w] single tokens); where it is False
    nothing is counted. Codes outside 0..k-1 are not counted either, so a sum smaller than the number of
    tokens shows that there were some. Under `jit` with sharded codes the result is the histogram of the global array.
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
    """exp(entropy of the code frequencies) in the window: how many equally frequent codes would be as diverse.

    Lies between 1 (one code) and the number of codes hit (all equally often); float32 rounding is clipped to
    these bounds. Codes never hit add 0; an empty window (all counts 0) gives 0.
    """
    weights = jnp.asarray(counts, jnp.float32)  # the counts of a long window may add up to more than an int32
    codes_hit = jnp.sum(weights > 0, dtype=jnp.float32)
    frequency = weights / jnp.maximum(jnp.sum(weights), 1.0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(frequency, frequency))
    return jnp.clip(jnp.exp(entropy), jnp.minimum(codes_hit, 1.0), codes_hit)


def usage_if_uniform(tokens: int, codebook_size: int) -> float:
    """The usage expected in a window of `tokens` independent, uniformly drawn codes: 1 - (1 - 1/k)^n."""
    if codebook_size == 1:
        return 1.0
    return -math.expm1(tokens * math.log1p(-1.0 / codebook_size))


def level_statistics(
    counts: Int[np.ndarray, "l k"], levels: Sequence[str], choices: int, window: str = ""
) -> dict[str, float]:
    """Usage and perplexity of every level or scale, named `usage/LEVEL` and so on.

    With them comes `usage_most/LEVEL`: the largest usage that so many tokens can show, n / choices if that is below 1.

    Args:
      counts: how often each code was chosen on each level.
      levels: their names; with none, nothing is returned.
      choices: from how many codes a level chooses, of which usage is the fraction.
      window: a further part of the names, such as "window/".
    """
    found: dict[str, float] = {}
    for name, own in zip(levels, counts, strict=False):
        found[f"usage/{window}{name}"] = int(np.count_nonzero(own)) / choices
        found[f"usage_most/{window}{name}"] = min(1.0, int(own.sum()) / choices)
        found[f"perplexity/{window}{name}"] = float(perplexity(own))
    return found


def usage_by_position(counts: Int[np.ndarray, "k"], positions: Int[np.ndarray, "k"]) -> Float[np.ndarray, "p"]:
    """The share (0..1) of the codes of each position that were chosen; see `Quantizer.positions`."""
    return np.bincount(positions, weights=counts > 0) / np.bincount(positions)


def position_statistics(
    counts: Int[np.ndarray, "k"], positions: Int[np.ndarray, "k"], window: str = ""
) -> dict[str, float | int]:
    """Of the usages by position the smallest, `positions/usage_min`, and how many are 0, `positions/dead`.

    If there is a single position, nothing is returned.

    Args:
      counts: how often each code was chosen.
      positions: of every code in its group.
      window: a further part of the names, such as "window/".
    """
    of_position = usage_by_position(counts, positions)
    if len(of_position) == 1:
        return {}
    return {
        f"positions/{window}usage_min": float(of_position.min()),
        f"positions/{window}dead": int(np.sum(of_position == 0)),
    }


def code_statistics(counts: Int[np.ndarray, "k"], pixels_per_code: float | int, choices: int) -> dict[str, float | int]:
    """How a set of tokens uses the codebook, beyond `usage` and `perplexity`.

    Args:
      counts: how often each code was chosen, over the whole set.
      pixels_per_code: how many pixels of an image become one code.
      choices: from how many codes each code is chosen, k unless levels have codes of their own. Those are assumed to
        have equally many tokens.

    Returns:
      `usage_if_uniform`: the usage that so many tokens give on average if all codes are equally likely.
      `dead_codes`: how many codes were never chosen.
      `top_1_percent_share`: the share of the tokens that chose one of the most frequent 1 % (rounded up) of the codes.
      `entropy_bits`: the entropy of the code frequencies, at most `log2_codebook_size`.
      `bits_per_pixel`: with log2(choices) bits for every code.
      `entropy_bits_per_pixel`: what an entropy coder needs that knows the frequencies, and of every code its level.
    """
    codebook_size, tokens = len(counts), int(counts.sum())
    frequency = np.sort(counts)[::-1] / max(tokens, 1)
    used = frequency[frequency > 0]
    entropy = float(np.sum(used * -np.log2(used)))
    bits, told = float(np.log2(codebook_size)), float(np.log2(codebook_size / choices))
    return {
        "usage_if_uniform": usage_if_uniform(tokens, codebook_size),
        "dead_codes": int(np.sum(counts == 0)),
        "top_1_percent_share": float(frequency[: -(-codebook_size // 100)].sum()),
        "entropy_bits": entropy,
        "log2_codebook_size": bits,
        "bits_per_pixel": (bits - told) / pixels_per_code,
        "entropy_bits_per_pixel": max(entropy - told, 0.0) / pixels_per_code,
    }
