"""From the bytes of a picture file to upright 8-bit RGB: formats, colour modes, rotation, damage, sizes.

Which files there are is left to `sources`, cropping to `transforms`, counting what cannot be read to `pipeline`.
"""

import io
import os
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

# A file of a few kilobytes can claim any size; one beyond this is refused from its header. 341 MiB once decoded. At the
# same size Pillow starts to warn.
MAX_PIXELS = 89_478_485
# None of Pillow's rarer formats, one of which runs a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# By EXIF orientation: how to turn the stored picture for it to stand upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow only warns where `open_image` refuses. Not by `catch_warnings`: that is for one thread.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImageError(ValueError):
    """What should be a picture cannot be used: damaged, not a picture, or larger than MAX_PIXELS."""


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a picture file, as `open_image` gives them."""
    return np.asarray(open_image(path))


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of the content of a picture file, as `open_image` gives them."""
    return np.asarray(open_image(data))


def open_image(file: str | os.PathLike[str] | bytes, min_side: int = 0) -> Image.Image:
    """A JPEG, PNG, WebP, GIF or BMP file, or the bytes of one, as an upright picture of mode RGB.

    Of an animation it is the first frame. Transparent pixels are laid over white (what lies under them is
    arbitrary), 16-bit grey is scaled to 8 bits, every other mode goes through Pillow's own conversion. With
    `min_side` a JPEG may come 2, 4 or 8 times smaller, its shorter side being at least that: it is then decoded at
    that size, which is quicker than decoding it whole and averaging. Those pixels are nearly, not quite, the average.

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
    """The picture of a `Record`, which holds a file's content, see `open_image`, or pixels, taken as they are."""
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
