"""Pixels as bytes and as floats: the only conversions between uint8 in 0..255 and floats in [-1, 1] or [0, 1]."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8


def to_float(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """uint8 pixels as floats in [-1, 1], as the networks take them."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_unit(pixels: UInt8[Array | np.ndarray, "*shape"]) -> Float32[Array, "*shape"]:
    """uint8 pixels as floats in [0, 1], as the metrics of single pictures take them."""
    return jnp.asarray(pixels, jnp.float32) / 255


def to_uint8(images: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """Floats in [-1, 1] as uint8 pixels of a saved picture: rounded and clipped; NaN becomes 0."""
    levels = jnp.round((jnp.asarray(images, jnp.float32) + 1.0) * 127.5)
    return jnp.nan_to_num(jnp.clip(levels, 0.0, 255.0)).astype(jnp.uint8)
