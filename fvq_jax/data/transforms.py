"""From a decoded picture to a square crop of uint8 pixels: colour conversion, resizing, cropping, flipping.

Pure functions: the same picture and the same generator state give the same pixels. Files are opened in
`sources`, and the conversion to floats in [-1, 1] happens on the device, where it costs a quarter of the
transfer.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of any PIL image as upright 8-bit RGB.

    The EXIF rotation is applied; transparent pixels are laid over white (what lies under them is
    arbitrary); 16-bit grey is scaled to 8 bits (PIL would clip it); every other mode goes through PIL's own
    conversion.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image, np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def resize_shorter_side(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Resized so that the shorter side is `side` pixels, the aspect ratio kept.

    Box filter in exact halves while the picture is at least twice too large, then bicubic: the recipe of
    ADM (arXiv 2105.05233), usual for ImageNet generation, and quicker than one large bicubic filter.
    """
    if min(image.shape[:2]) == side:
        return image
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    size = (max(side, round(picture.width * scale)), max(side, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def random_resize_crop(
    image: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    image_size: int,
    resize_min: int,
    resize_max: int,
) -> UInt8[np.ndarray, "s s 3"]:
    """Random square crop of `image_size` pixels after the shorter side was resized to a random length.

    The length is uniform in [resize_min, resize_max] (256 to 320 for 256-pixel crops in arXiv 2509.10140),
    the offset uniform over the positions that fit. `resize_min` 0 crops from the picture as it is; a
    picture smaller than the crop is enlarged to it.
    """
    side = int(rng.integers(resize_min, resize_max + 1)) if resize_min else min(image.shape[:2])
    image = resize_shorter_side(image, max(side, image_size))
    top, left = (int(rng.integers(length - image_size + 1)) for length in image.shape[:2])
    return image[top : top + image_size, left : left + image_size]


def random_flip(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Mirrored left to right with probability one half."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def center_crop(image: UInt8[np.ndarray, "H W 3"], image_size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central square of `image_size` pixels after the shorter side was resized to `image_size`."""
    image = resize_shorter_side(image, image_size)
    top, left = ((length - image_size) // 2 for length in image.shape[:2])
    return image[top : top + image_size, left : left + image_size]
