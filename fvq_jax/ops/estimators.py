"""Gradient estimators for the quantizer, since its choice of a code has no gradient."""

import jax
from jaxtyping import Array, Float


@jax.custom_jvp
def straight_through(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """The value of `z_q`, bit for bit, with the gradient of `z` (identity); none reaches `z_q`.

    Source: arXiv 1711.00937, sec. 3.2.
    """
    return z_q


@straight_through.defjvp
def _pass_to_latent(values, tangents):
    return values[1], tangents[0]
