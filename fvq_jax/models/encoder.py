"""The convolutional encoder: image to feature grid. Structure: arXiv 2012.09841, as in LlamaGen (arXiv 2406.06525)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fvq_jax.models.layers import AttentionBlock, Conv, Downsample, GroupNorm, ResBlock, levels_from_zero


class Encoder(nn.Module):
    """Residual blocks at len(ch_mult) resolutions, each half the one before; attention in some of them.

    Level i has ch * ch_mult[i] channels; level 0 is full resolution. In the levels `attention_levels` (-1 is the
    lowest) an attention block follows each residual block. `remat` recomputes blocks in the backward pass instead of
    keeping their activations.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention_levels: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w z"]:
        """Images in [-1, 1] to features; H and W must be multiples of 2^(len(ch_mult) - 1)."""
        res_block = nn.remat(ResBlock) if self.remat else ResBlock
        attention = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        lowest = len(self.ch_mult) - 1
        attended = levels_from_zero(self.attention_levels, len(self.ch_mult))
        h = Conv(self.ch, dtype=self.dtype, name="conv_in")(images.astype(self.dtype))
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.num_res_blocks):
                h = res_block(self.ch * mult, self.dtype, name=f"level{level}_res{i}")(h)
                if level in attended:
                    h = attention(self.dtype, name=f"level{level}_attention{i}")(h)
            if level != lowest:
                h = Downsample(self.dtype, name=f"level{level}_downsample")(h)
        h = res_block(h.shape[-1], self.dtype, name="mid_res0")(h)
        h = attention(self.dtype, name="mid_attention")(h)
        h = res_block(h.shape[-1], self.dtype, name="mid_res1")(h)
        h = GroupNorm(self.dtype, swish=True, name="norm_out")(h)
        return Conv(self.z_channels, dtype=self.dtype, name="conv_out")(h)
