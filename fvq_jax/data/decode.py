"""From the bytes of a picture file to upright 8-bit RGB: formats, colour modes, rotation, damage, sizes.

`sources` finds the files, `transforms` crops the pictures, and `pipeline` counts the files that cannot be read.
"""

import io
import os
import re
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from fvq_jax.runtime.paths import POINTER_ADVICE, is_pointer

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

    A JPEG file whose end marker is missing is read if all its pixels are there, see `_with_end`. Other damage is not
    mended: Pillow could fill up what is missing with grey, which nobody would notice in training.

    Raises UnreadableImageError, whatever is wrong with the file.
    """
    try:
        return _open(file, min_side)
    except UnreadableImageError as error:
        if (whole := _with_end(file)) is None:
            raise
        try:
            return _open(whole, min_side)
        except UnreadableImageError:
            raise error from None


def _open(file: str | os.PathLike[str] | bytes, min_side: int) -> Image.Image:
    """See `open_image`; the file must be whole."""
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
        if is_pointer(_content(file)):
            raise UnreadableImageError(POINTER_ADVICE) from error
        raise UnreadableImageError("not a JPEG, PNG, WebP, GIF or BMP file") from error
    except Exception as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _with_end(file: str | os.PathLike[str] | bytes) -> bytes | None:
    """The content of a JPEG file with the end marker that it lacks; None if pixels are missing too, or it is no JPEG.

    The decoder makes up what is missing from zeros, or from whatever is put behind the file. So no pixel is missing if
    both give the same pixels, unless the file ends between two passes, see `_passes`.
    """
    data = _content(file)
    if not data.startswith(b"\xff\xd8") or data.endswith(b"\xff\xd9"):
        return None
    body = data[:-1] if data.endswith(b"\xff") else data  # half a marker
    pictures = []
    for filling in (b"", b"\xaa" * 64):  # bits that differ from zeros at once
        try:
            with Image.open(io.BytesIO(body + filling + b"\xff\xd9"), formats=("JPEG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                image.load()
                if len(_passes(data)) < len(image.getbands()) * (2 if "progressive" in image.info else 1):
                    return None
                pictures.append(np.asarray(image))
        except Exception:
            return None
    return body + b"\xff\xd9" if np.array_equal(pictures[0], pictures[1]) else None


def _content(file: str | os.PathLike[str] | bytes) -> bytes:
    """The bytes of a file; empty if it cannot be read."""
    try:
        return file if isinstance(file, bytes) else Path(file).read_bytes()
    except OSError:
        return b""


def _passes(data: bytes) -> set[tuple[int, bool]]:
    """Which passes of a JPEG file bring a colour to its full precision: (number of the colour, whether its mean).

    A colour needs one, or in a progressive file two: of the means of the blocks, and of all finer waves.
    """
    frame = max((match.start() for match in re.finditer(rb"\xff[\xc0-\xc2]", data)), default=0)
    found = set()
    for start in re.finditer(rb"\xff\xda", data[frame:]):
        header = data[frame + start.end() + 2 :]  # after its length
        colours, (first, last, bits) = header[1 : 1 + 2 * header[0] : 2], header[1 + 2 * header[0] :][:3]
        if bits & 15 == 0 and (first == 0 or last == 63):  # no bits and no waves are left for later
            found |= {(colour, first == 0) for colour in colours}
    return found


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
