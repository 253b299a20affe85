"""The convolutional decoder: feature grid to image. Structure: arXiv 2012.09841, as in LlamaGen (arXiv 2406.06525)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fvq_jax.models.layers import AttentionBlock, Conv, GroupNorm, ResBlock, Upsample, levels_from_zero


class Decoder(nn.Module):
    """The encoder in reverse, with one residual block more at each level; levels are numbered as in the encoder.

    The activations in front of the last convolution are sown as `last_features` (for the adaptive adversarial
    weight, which is a ratio of gradients of that convolution).
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention_levels: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, features: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        """Features to images, about [-1, 1] but not clipped, in float32."""
        res_block = nn.remat(ResBlock) if self.remat else ResBlock
        attention = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        lowest = len(self.ch_mult) - 1
        attended = levels_from_zero(self.attention_levels, len(self.ch_mult))
        h = Conv(self.ch * self.ch_mult[lowest], dtype=self.dtype, name="conv_in")(features.astype(self.dtype))
        h = res_block(h.shape[-1], self.dtype, name="mid_res0")(h)
        h = attention(self.dtype, name="mid_attention")(h)
        h = res_block(h.shape[-1], self.dtype, name="mid_res1")(h)
        for level in range(lowest, -1, -1):
            for i in range(self.num_res_blocks + 1):
                h = res_block(self.ch * self.ch_mult[level], self.dtype, name=f"level{level}_res{i}")(h)
                if level in attended:
                    h = attention(self.dtype, name=f"level{level}_attention{i}")(h)
            if level != 0:
                h = Upsample(self.dtype, name=f"level{level}_upsample")(h)
        h = GroupNorm(self.dtype, swish=True, name="norm_out")(h)
        self.sow("intermediates", "last_features", h)
        # float32: bfloat16 has 8 significant bits, so it rounds pixels as coarsely as a picture file does.
        return Conv(3, dtype=jnp.float32, name="conv_out")(h)
