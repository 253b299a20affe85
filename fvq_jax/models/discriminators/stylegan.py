"""The residual discriminator that LlamaGen offers next to PatchGAN: one logit per image.

The layout is StyleGAN2's (arXiv 1912.04958: residual blocks, blurred down-sampling, two dense layers at 4 x 4),
without its equalized learning rate and minibatch standard deviation, which the published code leaves out. The losses
on its logits are `fvq_jax.ops.adversarial`; PyTorch weights are read by `fvq_jax.interop.discriminator`.
"""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fvq_jax.models.layers import fan_in_uniform
from fvq_jax.ops.matmul import matmul_precision

SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
IMAGE_SIZES = SIZES[1:]  # the smallest is where the network ends


class StyleGANDiscriminator(nn.Module):
    """Halves the image down to 4 x 4, then two dense layers; leaky ReLU 0.2.

    A feature map of s x s pixels has 512 channels up to s = 32, then 16384 / s x `channel_multiplier`. Layers run in
    `dtype`; parameters and logits are float32. Kernels and biases start uniform in +-1/sqrt(fan-in), as the
    published code leaves them.
    """

    image_size: int = 256
    channel_multiplier: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"], *, train: bool) -> Float[Array, "b 1"]:
        """Logits, positive for real, of images in [-1, 1]; `train` changes nothing, for there are no statistics.

        ValueError if `image_size` is not a power of two in 8..1024, or not the size of the images.
        """
        if self.image_size not in IMAGE_SIZES:
            raise ValueError(f"image_size={self.image_size} must be one of {', '.join(map(str, IMAGE_SIZES))}")
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"the discriminator is for images of {self.image_size}x{self.image_size} pixels, "
                f"got {images.shape[1]}x{images.shape[2]}"
            )
        x = nn.leaky_relu(_conv(images, self._channels(self.image_size), 3, 1, self.dtype, "conv_in"), 0.2)
        for i, size in enumerate(reversed(SIZES[: SIZES.index(self.image_size)])):
            x = ResidualDown(self._channels(size), self.dtype, name=f"block_{i}")(x)
        x = nn.leaky_relu(_conv(x, self._channels(4), 3, 1, self.dtype, "conv_out"), 0.2)
        x = x.reshape(x.shape[0], -1)
        x = nn.leaky_relu(_dense(x, self._channels(4), self.dtype, "dense_0"), 0.2)
        return _dense(x, 1, self.dtype, "dense_1").astype(jnp.float32)

    def _channels(self, size: int) -> int:
        return 512 if size <= 32 else 16384 // size * self.channel_multiplier


class ResidualDown(nn.Module):
    """Two 3x3 convolutions, a blur, a 3x3 convolution of stride 2; a strided 1x1 shortcut is added; over sqrt(2)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 d"]:
        """Halves height and width, which must be even."""
        shortcut = _conv(x, self.features, 1, 2, self.dtype, "shortcut")
        x = nn.leaky_relu(_conv(x, self.features, 3, 1, self.dtype, "conv_0"), 0.2)
        x = nn.leaky_relu(_conv(x, self.features, 3, 1, self.dtype, "conv_1"), 0.2)
        x = _conv(blur(x), self.features, 3, 2, self.dtype, "downsample")
        return (x + shortcut) * math.sqrt(0.5)


def blur(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Binomial 3x3 filter, rows then columns of (1, 2, 1) / 4, on every channel; borders are mirrored."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


def _conv(x: Array, features: int, size: int, stride: int, dtype: DTypeLike, name: str) -> Array:
    init = fan_in_uniform(x.shape[-1] * size * size)
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=init,
        bias_init=init,
        name=name,
    )(x)


def _dense(x: Array, features: int, dtype: DTypeLike, name: str) -> Array:
    init = fan_in_uniform(x.shape[-1])
    precision = matmul_precision(dtype)
    return nn.Dense(features, dtype=dtype, precision=precision, kernel_init=init, bias_init=init, name=name)(x)
