"""How a code is drawn from logits: guidance, temperature, top-k, top-p, and randomness that belongs to an image.

Everything is float32. Neither top-k nor top-p sorts: the smallest logit that stays is found bit by bit, in 32 passes
over the logits, so that k and p may change without compiling again and a vocabulary may have a million codes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

SCHEDULES = ("constant", "cosine", "linear")

Logits = Float[Array | np.ndarray, "b v"]


def guidance_scales(
    scale: float, length: int, schedule: str = "constant", *, interval: int = -1, power: float = 1.0
) -> Float[np.ndarray, "t"]:
    """The scale of guidance at each of `length` positions; where it is 1, logits are those of the class alone.

    Args:
      scale: the largest scale.
      length: codes of an image.
      schedule: "constant"; "cosine", 1 + (scale - 1) (1 - cos(pi (p / length)^power)) / 2 at position p, as published
        with RAR (arXiv 2411.00776); or "linear", from 1 at the first position to `scale` at the last one.
      interval: LlamaGen's `cfg_interval`: only positions 0 to interval + 1 are guided; -1: all.
      power: of the cosine schedule; the larger, the later the scale rises.
    """
    position = np.arange(length)
    if schedule == "constant":
        rise = np.ones(length)
    elif schedule == "cosine":
        rise = (1 - np.cos(np.pi * (position / length) ** power)) / 2
    elif schedule == "linear":
        rise = position / max(length - 1, 1)
    else:
        raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    guided = np.full(length, True) if interval < 0 else position <= interval + 1
    return np.where(guided, 1 + (scale - 1) * rise, 1).astype(np.float32)


def guided(conditional: Logits, unconditional: Logits, scale: Float[Array, ""]) -> Logits:
    """unconditional + scale (conditional - unconditional); exactly `conditional` where the scale is 1."""
    return jnp.where(scale == 1, conditional, unconditional + scale * (conditional - unconditional))


def keep_top_k(logits: Logits, k: Int[Array, ""] | int) -> Logits:
    """The logits with all but the k largest at minus infinity; those equal to the k-th stay. k is at least 1."""
    ranks = _ranks(logits)
    smallest = _largest_where(lambda bound: jnp.sum(ranks >= bound, axis=-1, keepdims=True) >= k, ranks)
    return jnp.where(ranks >= smallest, logits, -jnp.inf)


def keep_top_p(logits: Logits, p: Float[Array, ""] | float) -> Logits:
    """The logits with those at minus infinity before which, in order of size, more than p of the probability lies.

    So the code with which the sum of probabilities passes p stays, and the likeliest one always does. Equal logits stay
    or go together. p is at least 0.
    """
    ranks, probabilities = _ranks(logits), jax.nn.softmax(logits, axis=-1)

    def too_much(bound: UInt32[Array, "b 1"]) -> Bool[Array, "b 1"]:
        return jnp.sum(jnp.where(ranks > bound, probabilities, 0), axis=-1, keepdims=True) > p

    return jnp.where(ranks > _largest_where(too_much, ranks), logits, -jnp.inf)


def image_keys(seed: UInt32[Array, ""] | int, numbers: UInt32[Array, "b"] | Int[Array, "b"]) -> Shaped[Array, "b"]:
    """A key for each image, from the seed and the image's number: the same in any batch, on any device."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


def draw(
    logits: Logits,
    words: UInt32[Array | np.ndarray, "b 2"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> Int[Array, "b"]:
    """A code for each image, drawn from the logits divided by the temperature, cut by `top_k` and then by `top_p`.

    Every code has an exponential random number of its own, and the code wins for which its number, divided by the
    code's probability, is smallest (a race of exponential clocks, or the Gumbel-max trick). So rounding of the logits
    matters only where two codes finish at the same time. With one number for each image, looked up in the sums of the
    probabilities, the rounding of every code would move the parts of all codes after it.

    Args:
      logits: float32; minus infinity for codes that must not be drawn.
      words: random bits for each image, see `random_words`.
      temperature: above 0; see `greedy` for 0.
      top_k, top_p: see `keep_top_k` and `keep_top_p`; None: all codes may be drawn.
    """
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return greedy(logits - jnp.log(exponential_numbers(words, logits.shape[-1])))


def greedy(logits: Logits) -> Int[Array, "b"]:
    """The likeliest code of each image; of equal ones the lowest. Logits must not be NaN."""
    # In two passes of floating-point numbers, which a CPU vectorises. An argmax takes it twice as long, and five times
    # with the random numbers of `draw`, which would be made inside it.
    logits = jax.lax.optimization_barrier(logits)  # not computed in both
    count = logits.shape[-1]
    number = jnp.arange(count, dtype=jnp.float32)[None]  # exact up to 2^24 codes
    first = jnp.min(jnp.where(logits == logits.max(axis=-1, keepdims=True), number, count - 1), axis=-1)
    return first.astype(jnp.int32)


def random_words(keys: Shaped[Array, "b"], position: Int[Array, ""] | int) -> UInt32[Array, "b 2"]:
    """Random bits for each image at a position, from the image's key (see `image_keys`)."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)


def exponential_numbers(words: UInt32[Array | np.ndarray, "b 2"], count: int) -> Float[Array, "b v"]:
    """`count` numbers above 0 from the exponential distribution of mean 1 for each row, a function of the row's words.

    They are hashed from the words and their own index: JAX's generator would take longer than the transformer does for
    the codes of a small batch on a CPU.
    """
    words = jnp.asarray(words)
    bits = _mixed(jnp.arange(count, dtype=jnp.uint32)[None] * jnp.uint32(0x9E3779B9) ^ words[:, :1])
    bits = _mixed(bits ^ words[:, 1:])
    # Small numbers win races, and are fine-grained: the uniform number below 1 loses only bits that do not matter.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32), jnp.float32(1 - 2**-24))
    return -jnp.log1p(-uniform)


def _mixed(bits: UInt32[Array, "*b"]) -> UInt32[Array, "*b"]:
    """A permutation of the 32-bit numbers in which every bit of the result depends on all bits of the argument."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def _ranks(logits: Logits) -> UInt32[Array, "b v"]:
    """Whole numbers in the order of the logits; equal logits have equal numbers."""
    bits = jax.lax.bitcast_convert_type(logits + 0.0, jnp.uint32)  # + 0.0: of the two zeros only one is left
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _largest_where(holds: Callable[[Array], Array], ranks: UInt32[Array, "b v"]) -> UInt32[Array, "b 1"]:
    """The largest bound of each row for which `holds`, which holds up to some bound and for none above it; or 0."""

    def set_bit(number: Array, bound: Array) -> Array:
        higher = bound | jnp.uint32(1) << (31 - number).astype(jnp.uint32)
        return jnp.where(holds(higher), higher, bound)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((ranks.shape[0], 1), jnp.uint32))
