"""Vectors of unit length."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def l2_normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Scales every vector to unit length; a vector shorter than 1e-12 is divided by 1e-12 (no NaN)."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
    return x / norm
