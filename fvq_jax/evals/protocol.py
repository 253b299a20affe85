"""The two ways in which reconstructions are scored. A score without the name of its protocol cannot be compared.

`direct` is how most tokenizers are scored. `published` is how the FVQ paper's figures were made: with another crop, and
with JPEG on both sides. JPEG damages both alike, which brings their distributions closer, so the rFID is lower.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fvq_jax.data.transforms import center_no_resize, resize_center

JPEG_QUALITY = 75
PROTOCOLS = {
    "direct": "shorter side resized, central crop; crops and reconstructions scored as 8-bit arrays",
    "published": f"central crop, not resized; crops and reconstructions scored after JPEG of quality {JPEG_QUALITY}",
}
WHEN_SMALL = {"direct": "enlarged", "published": "framed"}  # what happens to a picture that is smaller than the crop
CROPS = {"direct": resize_center, "published": center_no_resize}
_THREADS = min(8, os.cpu_count() or 1)


def as_scored(images: UInt8[np.ndarray, "b H W 3"], protocol: str) -> UInt8[np.ndarray, "b H W 3"]:
    """Crops or reconstructions, as `protocol` scores them."""
    if protocol == "direct":
        return images
    with ThreadPoolExecutor(_THREADS) as pool:
        return np.stack(list(pool.map(_through_jpeg, images)))


def _through_jpeg(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    with Image.open(file) as again:
        return np.asarray(again)
