"""PatchGAN, the discriminator of the published recipe, and the batch normalization it needs.

The losses on its logits are `fvq_jax.ops.adversarial`; PyTorch weights are read by `fvq_jax.interop.discriminator`; the
StyleGAN-like alternative is `fvq_jax.models.discriminators.stylegan`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fvq_jax.ops.matmul import matmul_precision


class BatchNorm(nn.Module):
    """Batch normalization over batch and space, with PyTorch's running statistics (arXiv 1502.03167).

    Written out because `flax.linen.BatchNorm` keeps the biased variance, where PyTorch keeps n/(n-1) times that, and
    fails if a caller wants only the logits, not the statistics. Statistics, scale, bias and the sums are float32,
    whatever the dtype of `x`; the variance is that of the centred values, since E[x^2] - E[x]^2 cancels. Over a batch
    sharded under `jit` the means are those of the global batch.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        """Normalizes by the statistics of `x` when training, else by the running ones; returns the dtype of `x`.

        Training moves the running statistics only if the caller made `batch_stats` mutable.
        """
        channels = x.shape[-1:]
        scale = self.param("scale", _normal_around_one, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)

        values = x.astype(jnp.float32)
        if train:
            mean = jnp.mean(values, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(values - _over_pixels(mean)), axis=(0, 1, 2))
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((values - _over_pixels(mean)) * _over_pixels(gain) + _over_pixels(bias)).astype(x.dtype)


class PatchGAN(nn.Module):
    """Judges overlapping patches of an image: 4x4 convolutions, BatchNorm, leaky ReLU 0.2 (arXiv 1611.07004).

    `n_layers` convolutions of stride 2 widen from `ndf` to at most 8 `ndf` channels; one of stride 1 and a
    projection to one logit follow. Convolutions run in `dtype`; parameters, statistics and logits are float32.
    Kernels start as normal(0, 0.02), scales as normal(1, 0.02), biases as 0.
    """

    ndf: int = 64
    n_layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"], *, train: bool) -> Float[Array, "b h w 1"]:
        """Logits, positive for real, of images in [-1, 1]; h = H / 2^n_layers - 2.

        With `train` BatchNorm uses the statistics of this batch, and moves its running ones if the caller made
        `batch_stats` mutable. ValueError if the images are too small to leave a logit.
        """
        smallest = 3 * 2**self.n_layers
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"PatchGAN with n_layers={self.n_layers} needs images of at least {smallest} pixels, "
                f"got {images.shape[1]}x{images.shape[2]}"
            )
        conv = functools.partial(
            nn.Conv,
            kernel_size=(4, 4),
            padding=1,
            dtype=self.dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=nn.initializers.normal(0.02),
        )
        x = nn.leaky_relu(conv(self.ndf, strides=2, name="conv_0")(images), 0.2)
        for i in range(1, self.n_layers + 1):
            strides = 2 if i < self.n_layers else 1
            x = conv(self.ndf * min(2**i, 8), strides=strides, use_bias=False, name=f"conv_{i}")(x)
            x = nn.leaky_relu(BatchNorm(name=f"norm_{i}")(x, train=train), 0.2)
        return conv(1, strides=1, name="conv_out")(x).astype(jnp.float32)


def _normal_around_one(key: Array, shape: tuple[int, ...]) -> Float[Array, "c"]:
    return 1 + 0.02 * jax.random.normal(key, shape, jnp.float32)


def _over_pixels(per_channel: Float[Array | np.ndarray, "c"]) -> Float[Array, "1 1 1 c"]:
    return jnp.expand_dims(per_channel, (0, 1, 2))
