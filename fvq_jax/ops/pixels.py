"""Pixels as bytes and as floats: the only conversions between uint8 in 0..255 and floats in [-1, 1] or [0, 1]."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

ROUNDINGS = {
    "round": "to the nearest of 0..255, a half to the even one",
    "truncate": "127.5 x + 128 without its fraction, as LlamaGen's programs do: to the nearest too, but a half upwards",
}


def to_float(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """uint8 pixels as floats in [-1, 1], as the networks take them."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_unit(pixels: UInt8[Array | np.ndarray, "*shape"]) -> Float32[Array, "*shape"]:
    """uint8 pixels as floats in [0, 1], as the metrics of single pictures take them."""
    return jnp.asarray(pixels, jnp.float32) / 255


def to_uint8(images: Float[Array | np.ndarray, "*shape"], rounding: str = "round") -> UInt8[Array, "*shape"]:
    """Floats in [-1, 1] as uint8 pixels of a saved picture, clipped; NaN becomes 0.

    `rounding` is a name in `ROUNDINGS`; ValueError for another.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}")
    images = jnp.asarray(images, jnp.float32)
    levels = jnp.round((images + 1.0) * 127.5) if rounding == "round" else jnp.floor(images * 127.5 + 128.0)
    return jnp.nan_to_num(jnp.clip(levels, 0.0, 255.0)).astype(jnp.uint8)
