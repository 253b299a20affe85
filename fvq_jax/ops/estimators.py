"""Gradient estimators for the quantizer, since its choice of a code has no gradient."""

import jax
from jaxtyping import Array, Float


def straight_through(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """The value of `z_q` with the gradient of `z` (identity); none reaches `z_q`. arXiv 1711.00937, sec. 3.2."""
    return z + jax.lax.stop_gradient(z_q - z)
