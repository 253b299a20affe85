"""Convolution whose gradient of the kernel is computed in another way on a CPU, where XLA is slow at the whole.

It is summed over bands of rows; of a kernel that sees one pixel it is one matrix product.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Pixels of all images together in a band. The gradient of a kernel is one matrix product over the pixels of a batch;
# where they no longer fit into the cache, XLA's program for a CPU waits for memory. Each of several devices sees a
# part of them, and every band is summed over the devices by itself.
BAND = 4096
# Every band is written into the program, on every platform while it is traced; a large batch has larger bands.
MOST = 32
# With fewer features the product of a band is too small, and the whole is faster.
FEATURES = 8
# [b, H, W, c], [i, j, c, f] and [b, h, w, f]
ORDER = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolution(
    images: Float[Array, "b H W c"],
    kernel: Float[Array, "i j _ f"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = ORDER,
    feature_group_count: int = 1,
    precision: Any = None,
) -> Float[Array, "b h w f"]:
    """Like `lax.conv_general_dilated`, in whose place `nn.Conv` takes it.

    On a CPU the gradient of the kernel is a sum over bands, in float32 at least, so it rounds differently. If the batch
    is divided over devices, every band is summed over them by itself. A kernel of one pixel with stride 1 and without
    padding has no bands: its gradient is a matrix product. Programs for other platforms do not change. There are
    derivatives in reverse mode only, of any order.

    ValueError for dilation, groups and another order of dimensions.
    """
    if (
        any(tuple(dilation or (1, 1)) != (1, 1) for dilation in (lhs_dilation, rhs_dilation))
        or feature_group_count != 1
    ):
        raise ValueError("dilation and groups are not supported")
    if dimension_numbers != ORDER:
        raise ValueError("images must be NHWC and kernels HWIO, which are the default dimension_numbers")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    plain: Callable[..., Array] = partial(
        lax.conv_general_dilated, window_strides=strides, dimension_numbers=ORDER, precision=precision
    )

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
        if kernel.shape[:2] == (1, 1) == tuple(strides) and not any(map(any, padding)):
            on_cpu = partial(_kernel_gradient_of_pixels, kernel.dtype, precision)
        elif height < gradient.shape[1]:
            on_cpu = partial(_kernel_gradient_in_bands, plain, kernel, padding, strides[0], height)
        else:
            return of_images, whole(images, gradient)
        return of_images, lax.platform_dependent(images, gradient, cpu=on_cpu, default=whole)

    convolve.defvjp(forward, backward)
    return convolve(images, kernel)


def _kernel_gradient(plain, kernel, padding, images, gradient):
    return jax.linear_transpose(lambda kernel: plain(images, kernel, padding=padding), kernel)(gradient)[0]


def _kernel_gradient_of_pixels(dtype, precision, images, gradient):
    """The same of a kernel that sees one pixel."""
    kind = jnp.promote_types(dtype, jnp.float32)
    total = jnp.einsum("bhwc,bhwf->cf", images, gradient, precision=precision, preferred_element_type=kind)
    return total[None, None].astype(dtype)


def _kernel_gradient_in_bands(plain, kernel, padding, stride, height, images, gradient):
    """The sum over bands of `height` rows of the gradient; a band sees the rows of pixels that its kernels touch."""
    (above, _), columns = padding
    total = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
    for start in range(0, gradient.shape[1], height):
        band = gradient[:, start : start + height]
        first = start * stride - above
        end = first + (band.shape[1] - 1) * stride + kernel.shape[0]
        beyond = (max(0, -first), max(0, end - images.shape[1]))
        if end <= 0 or first >= images.shape[1]:
            continue  # it sees nothing but padding
        total += _kernel_gradient(plain, kernel, (beyond, columns), images[:, max(0, first) : end], band)
    return total.astype(kernel.dtype)


def _band_height(gradient):
    """Rows of a band; all rows where bands do not pay."""
    images, height, width, features = gradient.shape
    rows = max(1, BAND // max(1, images * width), -(-height // MOST))
    return rows if features >= FEATURES else height
