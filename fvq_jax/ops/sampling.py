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

_BLOCK = 128  # codes

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
    uniform: Float[Array | np.ndarray, "b"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | float | None = None,
) -> Int[Array, "b"]:
    """A code for each image, drawn from the logits divided by the temperature, cut by `top_k` and then by `top_p`.

    It is the code whose part of the interval [0, 1), divided among the codes by probability, holds the random number.
    That costs one number for each image instead of one for each code. The codes are looked through in blocks of 128:
    first the sums of all blocks, then the codes of one.

    Args:
      logits: float32; minus infinity for codes that must not be drawn.
      uniform: a random number in [0, 1) for each image, see `uniform_numbers`.
      temperature: above 0; see `greedy` for 0.
      top_k, top_p: see `keep_top_k` and `keep_top_p`; None: all codes may be drawn.
    """
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -logits.shape[-1] % _BLOCK))).reshape(logits.shape[0], -1, _BLOCK)
    sums = jnp.sum(weights, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform[:, None] * ends[:, -1:]
    block = _first_above(ends, target, sums > 0)
    begin = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0), axis=-1), 0)
    inside = jnp.take_along_axis(weights, block[:, :, None], axis=1)[:, 0]
    return (block * _BLOCK + _first_above(jnp.cumsum(inside, axis=-1), target - begin, inside > 0))[:, 0]


def greedy(logits: Logits) -> Int[Array, "b"]:
    """The likeliest code of each image; of equal ones the lowest."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def uniform_numbers(keys: Shaped[Array, "b"], position: Int[Array, ""] | int) -> Float[Array, "b"]:
    """A random number in [0, 1) for each image and position, from the image's key (see `image_keys`)."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)


def _first_above(
    ends: Float[Array, "b m"], target: Float[Array | np.ndarray, "b 1"], possible: Bool[Array, "b m"]
) -> Int[Array, "b 1"]:
    """The first possible of the growing `ends` above the target; the last possible if rounding put that too far."""
    above = possible & (ends > target)
    last = ends.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1, keepdims=True)
    first = jnp.argmax(above, axis=-1, keepdims=True)
    return jnp.where(jnp.any(above, axis=-1, keepdims=True), first, last).astype(jnp.int32)


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
