"""Pictures of originals and reconstructions, and of samples, for TensorBoard and for the page."""

import base64
import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Pictures = UInt8[np.ndarray, "n H W 3"]

_SMALLEST_SIDE = 128  # pixels; smaller pictures are enlarged
_PAIR_GAP, _COLUMN_GAP, _ROW_GAP = 2, 6, 14
QUALITY = 92  # of WebP, for pictures above the smallest side


def reconstruction_grid(
    originals: Pictures, reconstructions: Pictures, *, columns: int = 8
) -> UInt8[np.ndarray, "height width 3"]:
    """Every original with its reconstruction directly below it, pairs side by side, `columns` to a row, on white.

    Pictures with a side below 128 pixels are enlarged by a whole factor, each pixel repeated. ValueError
    without pictures or if the shapes differ.
    """
    if originals.shape != reconstructions.shape or len(originals) == 0:
        raise ValueError(f"need as many reconstructions as originals: {reconstructions.shape}, {originals.shape}")
    scale = math.ceil(_SMALLEST_SIDE / min(originals.shape[1:3]))
    pairs = np.stack([originals, reconstructions], axis=1).repeat(scale, axis=2).repeat(scale, axis=3)
    count, _, height, width, _ = pairs.shape
    columns = min(columns, count)
    pair_rows = math.ceil(count / columns)
    pair_height = 2 * height + _PAIR_GAP
    grid = np.full(
        (
            pair_rows * (pair_height + _ROW_GAP) - _ROW_GAP,
            columns * (width + _COLUMN_GAP) - _COLUMN_GAP,
            3,
        ),
        255,
        np.uint8,
    )
    for index, (original, reconstruction) in enumerate(pairs):
        top = index // columns * (pair_height + _ROW_GAP)
        left = index % columns * (width + _COLUMN_GAP)
        below = top + height + _PAIR_GAP
        grid[top : top + height, left : left + width] = original
        grid[below : below + height, left : left + width] = reconstruction
    return grid


def sample_grid(images: Pictures, *, columns: int) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures side by side, `columns` to a row, on white; small ones are enlarged as in `reconstruction_grid`.

    ValueError without pictures.
    """
    if len(images) == 0:
        raise ValueError("need at least one picture")
    scale = math.ceil(_SMALLEST_SIDE / min(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows, height + _PAIR_GAP, columns, width + _PAIR_GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        grid[index // columns, :height, index % columns, :width] = image
    return grid.reshape(rows * (height + _PAIR_GAP), columns * (width + _PAIR_GAP), 3)[:-_PAIR_GAP, :-_PAIR_GAP]


def is_lossless(image: UInt8[np.ndarray, "H W 3"]) -> bool:
    """Whether `data_uri` keeps every pixel: it does for small pictures, where lossy compression would show."""
    return max(image.shape[:2]) <= _SMALLEST_SIDE


def data_uri(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """The picture as a WebP file inside a URI."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", lossless=is_lossless(image), quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
