"""Layers shared by encoder and decoder: convolution, group norm, residual and attention blocks, resampling.

Arrays are [b, H, W, c]. `dtype` is the compute dtype; parameters are float32. Structure: arXiv 2012.09841 (VQGAN).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fvq_jax.ops.attention import attention
from fvq_jax.ops.group_norm import group_norm
from fvq_jax.ops.matmul import matmul_precision

GROUPS = 32


def fan_in_uniform(fan_in: int) -> Initializer:
    """Uniform within 1/sqrt(fan_in), for kernels and biases alike, as the published models start."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


def levels_from_zero(levels: tuple[int, ...], count: int) -> set[int]:
    """Numbers of levels out of `count`, of which negative ones are counted from the lowest, as numbers from 0.

    ValueError for a level that does not exist.
    """
    if not all(-count <= level < count for level in levels):
        raise ValueError(f"levels must be in {-count}..{count - 1}, since there are {count} resolutions, not {levels}")
    return {level % count for level in levels}


class Conv(nn.Module):
    """Square convolution with bias; by default the output keeps the input's height and width."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """Applies the convolution."""
        init = fan_in_uniform(x.shape[-1] * self.kernel_size**2)
        return nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.padding,
            dtype=self.dtype,
            precision=matmul_precision(self.dtype),
            kernel_init=init,
            bias_init=init,
            name="conv",
        )(x)


class GroupNorm(nn.Module):
    """Group normalisation: 32 groups, eps 1e-6, statistics in float32; then swish, also in float32, if asked."""

    dtype: DTypeLike = jnp.float32
    swish: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Normalises over height, width and the channels of a group."""
        scale, bias = _ScaleAndBias(x.shape[-1], name="norm")()
        return group_norm(x.astype(self.dtype), jnp.asarray(scale), jnp.asarray(bias), GROUPS, 1e-6, self.swish)


class _ScaleAndBias(nn.Module):
    """The parameters, under the names that `flax.linen.GroupNorm` gives them."""

    features: int

    @nn.compact
    def __call__(self):
        shape = (self.features,)
        return self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution on the shortcut where channels change."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b H W f"]:
        """Applies the block."""
        h = GroupNorm(self.dtype, swish=True, name="norm1")(x)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = GroupNorm(self.dtype, swish=True, name="norm2")(h)
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all positions; softmax in float32."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Applies the block."""
        b, H, W, c = x.shape
        h = GroupNorm(self.dtype, name="norm")(x)
        q, k, v = (Conv(c, kernel_size=1, dtype=self.dtype, name=name)(h) for name in ("q", "k", "v"))
        q, k, v = (y.reshape(b, H * W, 1, c) for y in (q, k, v))
        with jax.default_matmul_precision(matmul_precision(self.dtype)):
            h = attention(q, k, v)
        return x + Conv(c, kernel_size=1, dtype=self.dtype, name="out")(h.reshape(b, H, W, c))


class Downsample(nn.Module):
    """Halves height and width: a 3x3 convolution of stride 2, padded at the right and the bottom only."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w c"]:
        """Applies the convolution."""
        return Conv(x.shape[-1], stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """Repeats pixels and applies the convolution."""
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x)
