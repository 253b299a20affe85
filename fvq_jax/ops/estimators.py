"""Gradient estimators for the quantizer, since its choice of a code has no gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fvq_jax.ops.vectors import l2_normalize

SHORTEST = 1e-6  # latents below this length have no direction


@jax.custom_jvp
def straight_through(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """The value of `z_q`, bit for bit, with the gradient of `z` (identity); none reaches `z_q`.

    Source: arXiv 1711.00937, sec. 3.2.
    """
    return z_q


@straight_through.defjvp
def _pass_to_latent(values, tangents):
    return values[1], tangents[0].astype(values[1].dtype)


def rotation(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """The value of `z_q`, bit for bit, with the gradient of turning and stretching `z` until it is `z_q`.

    The turn happens in the plane of both vectors; directions outside it stay as they are. It is taken as constant, and
    no gradient reaches `z_q`. So a gradient keeps its angle to the vector and is stretched by |z_q| / |z|: it vanishes
    with codes that are much shorter than latents, as a fresh codebook's are. A `z` shorter than 1e-6 is not turned, and
    the gradient passes straight through. Opposite vectors are mirrored. Source: arXiv 2410.06424.
    """
    start, end = jax.lax.stop_gradient((z, z_q))
    length = jnp.linalg.norm(start, axis=-1, keepdims=True)
    stretch = jnp.linalg.norm(end, axis=-1, keepdims=True) / jnp.where(length > SHORTEST, length, 1)
    start, end = l2_normalize(start), l2_normalize(end)
    between = l2_normalize(start + end)

    def along(direction: Array) -> Array:
        return jnp.sum(direction * z, axis=-1, keepdims=True)

    turned = stretch * (z - 2 * along(between) * between + 2 * along(start) * end)
    return straight_through(jnp.where(length > SHORTEST, turned, z), z_q)


def dynamic(
    z: Float[Array, "*n d"], z_q: Float[Array, "*n d"], smallest_of_code: Callable[[Any], Any]
) -> Float[Array, "*n d"]:
    """The value of `z_q`, bit for bit; the gradient passes to a latent the less, the farther it is from its code.

    It is multiplied by (smallest squared distance of all latents with this code) / (squared distance of this latent),
    which is 1 for the nearest latent of a code and where both are 0. The factor is constant: no gradient goes through
    it, and none reaches `z_q`. Source: arXiv 2609.26774, where the minimum is said to be that of the batch; only
    the minimum per code gives every code a latent of factor 1.

    Args:
      smallest_of_code: gives for values [*n] the smallest over all tokens that have the same code, as
        `ops.code_tokens.smallest_of_code` does.
    """
    distance = jnp.sum(jnp.square(jax.lax.stop_gradient(z - z_q)), axis=-1)
    factor = jnp.where(distance > 0, smallest_of_code(distance) / jnp.where(distance > 0, distance, 1), 1)
    return straight_through(factor[..., None] * z, z_q)


# Those that need nothing but latents and vectors.
ESTIMATORS: dict[str, Callable[[Any, Any], Any]] = {"straight_through": straight_through, "rotation": rotation}
