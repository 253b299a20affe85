"""The two ways in which reconstructions are scored. A score without the name of its protocol cannot be compared.

`direct` is how most tokenizers are scored. `published` is how the FVQ paper's figures were made: another crop, and
JPEG on both sides, whose common damage brings the distributions closer, so its rFID is lower.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fvq_jax.data.sources import Record, Source

JPEG_QUALITY = 75
PROTOCOLS = {
    "direct": "shorter side resized, central crop; crops and reconstructions scored as 8-bit arrays",
    "published": f"central crop, not resized; crops and reconstructions scored after JPEG of quality {JPEG_QUALITY}",
}
_THREADS = min(8, os.cpu_count() or 1)


class Unresized:
    """The same source, its pictures cropped to `size` about their centre without resizing (`published`)."""

    def __init__(self, source: Source, size: int):
        self._source = source
        self._size = size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return {**record, "image": center_crop_unresized(record["image"], self._size)}

    def name(self, index: int) -> str:
        """That of the source."""
        return self._source.name(index)

    def fingerprint(self) -> str:
        """That of the source."""
        return self._source.fingerprint()


def center_crop_unresized(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central square of `size` pixels; a side that is shorter is filled up with black, as torchvision does."""
    height, width = image.shape[:2]
    before = [max(0, size - side) // 2 for side in (height, width)]
    after = [max(0, size - side) - first for side, first in zip((height, width), before, strict=True)]
    image = np.pad(image, (*zip(before, after, strict=True), (0, 0)))
    top, left = (round((length - size) / 2) for length in image.shape[:2])
    return image[top : top + size, left : left + size]


def as_scored(images: UInt8[np.ndarray, "b H W 3"], protocol: str) -> UInt8[np.ndarray, "b H W 3"]:
    """The pixels that `protocol` scores, of crops and of reconstructions alike."""
    if protocol == "direct":
        return images
    with ThreadPoolExecutor(_THREADS) as pool:
        return np.stack(list(pool.map(_through_jpeg, images)))


def _through_jpeg(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    with Image.open(file) as again:
        return np.asarray(again)
