"""Picture files that are not the usual 8-bit RGB: every kind that has stopped a data pipeline somewhere.

`readable` and `unreadable` give the content of each by its file name. A readable one is of one colour, GREY for most of
them once it is converted.
"""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

SIZE = (24, 16)
GREY = (100, 100, 100)
WHITE = (255, 255, 255)
# Of the others: what the transparent ones show is the white that they are laid over.
COLOURS = {"cmyk.jpg": (255, 0, 0), "alpha.png": WHITE, "palette_transparent.png": WHITE, "colour_key.png": WHITE}


@functools.cache
def readable() -> dict[str, bytes]:
    """Files that are converted."""
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([0, 0, 0, *GREY])
    two = [Image.new("RGB", SIZE, colour) for colour in (GREY, (200, 0, 0))]
    grey, jpeg = two[0], {"quality": 95}
    sideways = grey.getexif()
    sideways[ExifTags.Base.Orientation] = 6
    photo = encode(Image.new("RGB", SIZE, GREY), "JPEG", **jpeg)
    slow = encode(grey, "JPEG", progressive=True, **jpeg)
    return {
        "alpha.png": encode(Image.new("RGBA", SIZE, (9, 9, 9, 0)), "PNG"),
        "animated.gif.webp": encode(two[0], "WEBP", save_all=True, append_images=two[1:], lossless=True),
        "animated.png": encode(two[0], "GIF", save_all=True, append_images=two[1:]),
        "bitmap.jpg": encode(grey, "BMP"),
        "cmyk.jpg": encode(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "JPEG", **jpeg),
        "colour_key.png": encode(grey, "PNG", transparency=GREY),
        "damaged_exif.jpg": encode(grey, "JPEG", exif=b"Exif\0\0 of no kind", **jpeg),
        "grey.jpg": encode(grey.convert("L"), "JPEG", **jpeg),
        "grey_alpha.png": encode(Image.new("LA", SIZE, (100, 255)), "PNG"),
        "no_end.jpg": photo[:-2],
        "no_end_progressive.jpg": slow[:-2],
        "half_an_end.jpg": photo[:-1],
        "one_pixel.png": encode(Image.new("RGB", (1, 1), GREY), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette_transparent.png": encode(palette, "PNG", transparency=1),
        "progressive.jpg": slow,
        "really_a.jpg": encode(grey, "PNG"),
        "sideways.jpg": encode(grey, "JPEG", exif=sideways, **jpeg),
        "sixteen_bits.png": encode(Image.fromarray(np.full(SIZE[::-1], 25_700, np.uint16)), "PNG"),
        "sixteen_bits_rgb.png": png(*SIZE, bits=16, channels=3, value=100),
        "thin.png": encode(Image.new("RGB", (1, 20_000), GREY), "PNG"),
        "wide.jpg": encode(Image.new("RGB", (20_000, 30), GREY), "JPEG", **jpeg),
        "wide_and_thin.png": encode(Image.new("RGB", (20_000, 1), GREY), "PNG"),
    }


@functools.cache
def unreadable() -> dict[str, bytes]:
    """Files that cannot be used; the names say why. The bombs are whole, and refused for what they would take."""
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    whole = {ending: encode(Image.fromarray(noise), ending.upper()) for ending in ("jpeg", "png", "webp", "gif", "bmp")}
    passes = encode(Image.fromarray(noise), "JPEG", progressive=True)
    truncated = {f"truncated_{ending}.png": data[: len(data) * 3 // 4] for ending, data in whole.items()}
    only_header = {f"only_header_{ending}.jpg": data[:30] for ending, data in whole.items()}
    return (
        truncated
        | only_header
        | {
            "empty.jpg": b"",
            "cut_by_a_byte.jpg": whole["jpeg"][:-3],
            "cut_between_passes.jpg": passes[: passes.rfind(b"\xff\xc4")],
            "garbage.png": bytes(range(256)) * 4,
            "bomb.png": png(30_000, 30_000, bits=1),
            "small_bomb.png": png(10_000, 9_000, bits=1),  # Pillow only warns of this one
            "tiff.jpg": encode(Image.fromarray(noise), "TIFF"),
            "postscript.jpg": encode(Image.fromarray(noise), "EPS"),
            "zero_wide.png": png(0, 16, bits=8),
            "text.webp": b"404 Not Found",
        }
    )


def plain() -> bytes:
    """A file like any other."""
    return encode(Image.new("RGB", SIZE, GREY), "PNG")


def encode(image: Image.Image, form: str, **options) -> bytes:
    """The content of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, *, bits: int, channels: int = 1, value: int = 0) -> bytes:
    """A PNG file of that many bits per channel, each byte of it `value`."""
    row = b"\0" + bytes([value]) * ((width * channels * bits + 7) // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
