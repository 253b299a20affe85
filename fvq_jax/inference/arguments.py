"""Checks of the arrays that users hand to a tokenizer or a generator."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.runtime.errors import InputError

_NETWORK = 'tokenizer.net.apply({"params": tokenizer.params}, values, method="encode") (or "decode")'


def host_array(values: ArrayLike, what: str, inside: str = "") -> np.ndarray:
    """The values as an array of the host.

    Args:
      values: an array, or lists of numbers.
      what: what they are, for messages.
      inside: what can be called inside a compiled function in place of the method that is given these values.

    Raises:
      InputError: lists of different lengths, or an array that is being traced by `jax.jit` or the like.
    """
    if isinstance(values, jax.core.Tracer):
        instead = f"; inside, call {inside}" if inside else ""
        raise InputError(
            f"{what} are being traced by jax.jit or the like, and this method takes arrays of the host, for it runs "
            f"compiled programs of its own: call it outside the compiled function{instead}"
        )
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"{what} must be an array: {error}") from None


def checked_images(images: ArrayLike, value_range: tuple[float | int, float | int] | None) -> np.ndarray:
    """Images [b, H, W, 3], uint8 or float32 in [-1, 1]. InputError for what cannot be images.

    `value_range` is black and white of floating-point images, or None, as for `Tokenizer.encode`.
    """
    images = host_array(images, "images", _NETWORK)
    if images.ndim != 4 or images.shape[-1] != 3:
        first = " (the channels come last)" if images.ndim == 4 and images.shape[1] == 3 else ""
        raise InputError(f"images must be [b, H, W, 3], not {list(images.shape)}{first}")
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be uint8, or floating-point in [-1, 1], not {images.dtype}")
    return _centred(images.astype(np.float32), value_range)


def checked_codes(
    quantizer: Quantizer, codes: ArrayLike, upto: int | None
) -> tuple[Int[np.ndarray, "b ..."], tuple[int, int]]:
    """Codes as int32, and the rows and columns of their grid.

    `upto` is how many levels are to be decoded, or None. InputError for codes of another shape, type or range than the
    quantizer's, or for levels that it does not have.
    """
    codes = host_array(codes, "codes", _NETWORK)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise InputError(f"codes must be whole numbers, not {codes.dtype}")
    try:
        grid = quantizer.grid(codes.shape[1:])
    except ValueError as error:
        raise InputError(f"{error}, not {list(codes.shape)}") from None
    most = max(len(quantizer.level_names), 1)
    if upto is not None and not 1 <= upto <= most:
        raise InputError(f"upto must be in 1..{most}, the number of levels, not {upto}")
    if codes.size and not 0 <= codes.min() <= codes.max() < quantizer.size:
        raise InputError(f"codes must be in 0..{quantizer.size - 1}, and these are from {codes.min()} to {codes.max()}")
    if quantizer.choices < quantizer.size and np.any(codes % most != quantizer.level_of(*grid)):
        raise InputError(
            f"codes belong to other levels than those they stand in: code j of level l, both counted from 0, is number "
            f"{most} j + l: multiply by {most}, and add the level"
        )
    return codes.astype(np.int32), grid


def _centred(images: np.ndarray, value_range: tuple[float | int, float | int] | None) -> np.ndarray:
    """Floating-point images in [-1, 1]. InputError for values far beyond their range, a warning for an unlikely one."""
    black, white = value_range or (-1, 1)
    if not (black < white and np.isfinite([black, white]).all()):
        raise InputError(f"value_range must be black and white, such as (0, 1), not {value_range}")
    low, high = (images.min(), images.max()) if images.size else (black, white)
    images = images if (black, white) == (-1, 1) else (images - black) * (2 / (white - black)) - 1
    # Resizing and networks may go a little beyond the range; values far beyond it were never scaled.
    if images.size and not np.abs(images).max() <= 2:
        raise InputError(
            f"floating-point images must be in [{black:g}, {white:g}], not from {low:g} to {high:g} "
            "(value_range=(black, white) says what theirs is; uint8 images are scaled here)"
        )
    if value_range is None and images.size and low >= 0:
        warnings.warn(
            f"no value of these images is below 0 (they are from {low:g} to {high:g}), and they are taken for [-1, 1]: "
            "give value_range=(0, 1) if that is meant, or (-1, 1) to say so",
            stacklevel=4,  # the caller of `Tokenizer.encode` or `reconstruct`
        )
    return images
