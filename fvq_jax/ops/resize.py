"""Resizing of pictures and grids of floats, as PyTorch does it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_A = -0.75  # of the cubic kernel in PyTorch's `interpolate`; Pillow and `jax.image` have -0.5


def resize_bicubic(
    images: Float[Array | np.ndarray, "b H W c"], height: int, width: int
) -> Float[Array, "b height width c"]:
    """Pictures of another size, as PyTorch's `interpolate(mode="bicubic", antialias=False)` makes them; float32.

    Every pixel is a sum of 4 x 4 others around its place, also where the picture becomes smaller, and may be a little
    beyond their range. Beyond the edges, the pixels of the edge go on.
    """
    return _resized(images, height, width, _bicubic)


def resize_area(
    images: Float[Array | np.ndarray, "b H W c"], height: int, width: int
) -> Float[Array, "b height width c"]:
    """Smaller pictures of float32, as PyTorch's `interpolate(mode="area")` makes them.

    Every pixel is the mean of all others that its area touches. If the sizes do not divide each other, a pixel that
    lies in two areas counts for both.
    """
    return _resized(images, height, width, _area)


def _resized(images, height, width, weights):
    """Applies fixed matrices, which `weights` makes in float64, to rows and columns; the same size needs none."""
    images = jnp.asarray(images, jnp.float32)
    sides = images.shape[1:3]
    if sides == (height, width):
        return images
    rows, columns = (
        jnp.asarray(weights(before, after), jnp.float32) for before, after in zip(sides, (height, width), strict=True)
    )
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, images, precision="highest")


def _area(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """What each pixel along one side counts for each new one."""
    index, pixel = np.arange(after)[:, None], np.arange(before)[None]
    inside = (pixel >= index * before // after) & (pixel * after < (index + 1) * before)
    return inside / inside.sum(axis=1, keepdims=True)


def _bicubic(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """What each pixel along one side counts for each new one."""
    places = (np.arange(after) + 0.5) * before / after - 0.5
    first = np.floor(places).astype(int) - 1
    weights = np.zeros((after, before))
    for tap in range(4):
        distance = np.abs(places - (first + tap))
        near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
        far = _A * (((distance - 5) * distance + 8) * distance - 4)
        pixel = np.clip(first + tap, 0, before - 1)
        np.add.at(weights, (np.arange(after), pixel), np.where(distance <= 1, near, far))
    return weights
