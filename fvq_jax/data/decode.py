"""From the bytes of a picture file to upright 8-bit RGB: formats, colour modes, rotation, damage, sizes.

`sources` finds the files, `transforms` crops the pictures, and `pipeline` counts the files that cannot be read.
"""

import io
import os
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

# A file of a few kilobytes can claim any size. A picture of more pixels than this is refused before it is decoded. This
# many take 341 MiB once decoded. Pillow starts to warn at the same number.
MAX_PIXELS = 89_478_485
# Pillow's rarer formats are left out: one of them runs a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# EXIF orientation -> how the stored picture has to be turned to stand upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow only warns where `open_image` refuses. `catch_warnings` is no use here: it works for one thread only.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImageError(ValueError):
    """A file that should be a picture cannot be used: it is damaged, no picture, or has more than MAX_PIXELS pixels."""


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a picture file, as `open_image` gives them."""
    return np.asarray(open_image(path))


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a picture file, given the bytes of the file, as `open_image` gives them."""
    return np.asarray(open_image(data))


def open_image(file: str | os.PathLike[str] | bytes, min_side: int = 0) -> Image.Image:
    """A JPEG, PNG, WebP, GIF or BMP file, or the bytes of one, as an upright picture of mode RGB.

    An animation gives its first frame. Transparent pixels are laid over white (their own colour is arbitrary), 16-bit
    grey is scaled to 8 bits, and Pillow converts every other mode. With `min_side` a JPEG may come 2, 4 or 8 times
    smaller, but no side becomes shorter than `min_side`. It is then decoded at that size, which is quicker than
    decoding it whole and averaging; the pixels are nearly, but not exactly, those averages.

    Raises UnreadableImageError, whatever is wrong with the file.
    """
    # Pillow reports damage by OSError, SyntaxError, ValueError, struct.error and more, depending on the format.
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImageError(f"{width} x {height} pixels are over the limit of {MAX_PIXELS:,}")
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            picture = to_rgb(image)
            return picture if turn is None else picture.transpose(turn)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not a JPEG, PNG, WebP, GIF or BMP file") from error
    except Exception as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def open_stored(stored: bytes | UInt8[np.ndarray, "H W 3"], min_side: int = 0) -> Image.Image:
    """The picture of a `Record`: a file's content goes through `open_image`, pixels are taken as they are."""
    return open_image(stored, min_side) if isinstance(stored, bytes) else Image.fromarray(stored)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture in mode RGB; see `open_image`."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip it
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The picture's EXIF orientation; 1, upright, if it has none or its EXIF data are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
