"""From a decoded picture to a square crop of uint8 pixels: resizing, cropping, flipping.

Pure functions: the same picture and the same generator state give the same pixels. Decoding is left to
`decode`, and the conversion to floats in [-1, 1] happens on the device, so that a quarter of the bytes is
transferred. Pictures come as Pillow holds them, in mode RGB: the recipes below are defined by its filters.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def random_resize_crop(
    image: Image.Image, rng: np.random.Generator, image_size: int, resize_min: int, resize_max: int
) -> UInt8[np.ndarray, "s s 3"]:
    """Random square crop of `image_size` pixels after the shorter side was resized to a random length.

    The length is uniform in [resize_min, resize_max] (256 to 320 for 256-pixel crops in arXiv 2509.10140),
    the offsets are uniform over the positions that fit. `resize_min` 0 crops from the picture as it is; a
    picture smaller than the crop is enlarged to it. It resizes as ADM does, see `resize_center`. Draws from `rng`
    the length, if there is a choice, then the offsets from top and left.
    """
    side = int(rng.integers(resize_min, resize_max + 1)) if resize_min else min(image.size)
    return _resize_crop(image, max(side, image_size), image_size, lambda room: int(rng.integers(room + 1)))


def random_flip(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Mirrored left to right with probability one half."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def resize_center(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central square of `image_size` pixels after the shorter side was resized to `image_size`.

    The recipe of ADM (arXiv 2105.05233), usual for ImageNet generation: a box filter halves the picture while it is at
    least twice too large, a bicubic filter does the rest.
    """
    return _resize_crop(image, image_size, image_size, lambda room: room // 2)


def center_no_resize(image: Image.Image, image_size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central square of `image_size` pixels, not resized; outside the picture it is black, as in torchvision."""
    left, top = (
        round((length - image_size) / 2) if length >= image_size else -((image_size - length) // 2)
        for length in image.size
    )
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def _resize_crop(
    image: Image.Image, side: int, image_size: int, place: Callable[[int], int]
) -> UInt8[np.ndarray, "s s 3"]:
    """A square of `image_size` pixels, cut from the picture resized so that its shorter side is `side`.

    `place` gets the number of spare pixels along a side, and returns how many of them lie before the square; it is
    called for the height, then for the width. Only the square is made, so time and memory do not grow with the aspect
    ratio (a picture of 20,000 x 1 pixels, for instance).
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    top, left = place(height - image_size), place(width - image_size)
    square = (left, top, left + image_size, top + image_size)
    if image.size == (width, height):
        return np.asarray(image.crop(square))
    across, down = image.width / width, image.height / height
    box = (square[0] * across, square[1] * down, square[2] * across, square[3] * down)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC, box))
