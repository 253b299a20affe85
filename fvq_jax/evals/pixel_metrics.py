"""How close a reconstruction is to its original, image by image: PSNR, SSIM, L1, MSE.

The forms are the standard ones: images are RGB in [0, 1] (data range 1), float32 at highest precision whatever the
model computes in, and every metric returns one number per image, so that padding images can be masked and
means are taken over images. Tokenizers are compared on *saved pictures*, so a caller first rounds both sides
to 8 bits (`ops.pixels`). Everything here can be jitted. Running over a data set and averaging is left to
`reconstruction`; distances between feature distributions live elsewhere in `evals`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

Images = Float[Array | np.ndarray, "b H W c"]
PerImage = Float32[Array, "b"]

SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2
_MSE_FLOOR = 1e-12


def l1(a: Images, b: Images) -> PerImage:
    """Mean absolute difference over pixels and channels."""
    a, b = _float32_pair(a, b)
    return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


def mse(a: Images, b: Images) -> PerImage:
    """Mean squared difference over pixels and channels."""
    a, b = _float32_pair(a, b)
    return jnp.mean(jnp.square(a - b), axis=(1, 2, 3))


def psnr(a: Images, b: Images) -> PerImage:
    """Peak signal-to-noise ratio in dB over all channels, 10 log10(1 / mse).

    Identical images give 120 dB (mse is floored at 1e-12) and not infinity, so that a mean over images stays
    a number; a single step of 1/255 in a single value of a 256 x 256 image gives 101 dB.
    """
    return -10.0 * jnp.log10(jnp.maximum(mse(a, b), _MSE_FLOOR))


def ssim(a: Images, b: Images) -> PerImage:
    """Structural similarity, mean over the valid region and the channels (at most 1, for identical images).

    Gaussian window 11 x 11 with sigma 1.5, population covariance, K1 = 0.01, K2 = 0.03, no padding: the form
    of Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.
    ValueError if a side is below 11 pixels.
    """
    a, b = _float32_pair(a, b)
    height, width = a.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"ssim needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {height} x {width}")
    # Variances do not depend on an offset, and small values lose less to cancellation in E[x^2] - E[x]^2.
    offset = jnp.mean((a + b) / 2.0, axis=(1, 2), keepdims=True)
    centred_a, centred_b = a - offset, b - offset
    # Images stay the first axis, along which a mesh divides them.
    moments = jnp.stack([centred_a, centred_b, centred_a**2, centred_b**2, centred_a * centred_b], axis=1)
    mean_a, mean_b, square_a, square_b, product = jnp.moveaxis(_blur(moments), 1, 0)
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    mean_a, mean_b = mean_a + offset, mean_b + offset
    luminance = (2.0 * mean_a * mean_b + _SSIM_C1) / (mean_a**2 + mean_b**2 + _SSIM_C1)
    structure = (2.0 * covariance + _SSIM_C2) / (variances + _SSIM_C2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _blur(images: Float32[Array, "b m H W c"]) -> Float32[Array, "b m H2 W2 c"]:
    """The Gaussian window over the valid region, one axis after the other."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    window = (window / window.sum()).astype(np.float32)

    *leading, height, width, channels = images.shape
    planes = jnp.moveaxis(images, -1, 2).reshape(-1, height, width, 1)
    for kernel in (window.reshape(-1, 1, 1, 1), window.reshape(1, -1, 1, 1)):
        planes = jax.lax.conv_general_dilated(
            planes,
            jnp.asarray(kernel),
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
    planes = planes.reshape(*leading, channels, *planes.shape[1:3])
    return jnp.moveaxis(planes, 2, -1)


def _float32_pair(a: Images, b: Images) -> tuple[Float32[Array, "b H W c"], Float32[Array, "b H W c"]]:
    if a.shape != b.shape:
        raise ValueError(f"images to compare must have the same shape, got {a.shape} and {b.shape}")
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
