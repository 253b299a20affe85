"""Convolution whose gradient of the kernel is summed over bands of rows on a CPU, where XLA is slow at the whole."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Pixels of all images together in a band. The gradient of a kernel is one matrix product over the pixels of a batch;
# where they no longer fit into the cache, XLA's program for a CPU waits for memory.
BAND = 2048
# With fewer features the product of a band is too small, and the whole is faster.
FEATURES = 8


def convolution(
    images: Float[Array, "b H W c"],
    kernel: Float[Array, "i j _ f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **settings: Any,
) -> Float[Array, "b h w f"]:
    """`lax.conv_general_dilated` of images, which `nn.Conv` takes as its `conv_general_dilated`.

    Values and gradients are the same; on a CPU the gradient of the kernel is a sum in another order. Programs for other
    platforms do not change. It has derivatives in reverse mode only, of any order.

    Args:
      settings: the other arguments of `lax.conv_general_dilated`. ValueError for dilation and groups, which it does not
        have.
    """
    dilated = [settings.pop(name, None) for name in ("lhs_dilation", "rhs_dilation")]
    if any(d not in (None, (1, 1)) for d in dilated) or settings.pop("feature_group_count", 1) != 1:
        raise ValueError("dilation and groups are not supported")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    plain: Callable[..., Array] = partial(lax.conv_general_dilated, window_strides=strides, **settings)

    @jax.custom_vjp
    def convolve(images, kernel):
        return plain(images, kernel, padding=padding)

    def forward(images, kernel):
        return convolve(images, kernel), (images, kernel)

    def backward(saved, gradient):
        images, kernel = saved
        (of_images,) = jax.linear_transpose(lambda x: plain(x, kernel, padding=padding), images)(gradient)
        whole = partial(_kernel_gradient, plain, kernel, padding)
        height = _band_height(gradient)
        if height < gradient.shape[1]:
            in_bands = partial(_kernel_gradient_in_bands, plain, kernel, padding, strides[0], height)
            return of_images, lax.platform_dependent(images, gradient, cpu=in_bands, default=whole)
        return of_images, whole(images, gradient)

    convolve.defvjp(forward, backward)
    return convolve(images, kernel)


def _kernel_gradient(plain, kernel, padding, images, gradient):
    return jax.linear_transpose(lambda kernel: plain(images, kernel, padding=padding), kernel)(gradient)[0]


def _kernel_gradient_in_bands(plain, kernel, padding, stride, height, images, gradient):
    """The sum over bands of `height` rows of the gradient; a band sees the rows of pixels that its kernels touch."""
    (above, _), columns = padding
    total = jnp.zeros_like(kernel)
    for start in range(0, gradient.shape[1], height):
        band = gradient[:, start : start + height]
        first = start * stride - above
        end = first + (band.shape[1] - 1) * stride + kernel.shape[0]
        beyond = (max(0, -first), max(0, end - images.shape[1]))
        if end <= 0 or first >= images.shape[1]:
            continue  # it sees nothing but padding
        total += _kernel_gradient(plain, kernel, (beyond, columns), images[:, max(0, first) : end], band)
    return total


def _band_height(gradient):
    """Rows of a band; all rows where bands do not pay."""
    images, height, width, features = gradient.shape
    return max(1, BAND // (images * width)) if features >= FEATURES else height
