"""The tokenizer network: encoder, quantizer, decoder. Images are [b, H, W, 3] in [-1, 1], codes int32 [b, h, w]."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fvq_jax.models.decoder import Decoder
from fvq_jax.models.encoder import Encoder
from fvq_jax.models.layers import Conv
from fvq_jax.models.quantizer import Quantizer


@struct.dataclass
class TokenizerOutput:
    """A forward pass: `reconstruction` float32 [b, H, W, 3], not clipped, and what the quantizer returned."""

    reconstruction: Any
    quantized: Any  # Quantized


class TokenizerNet(nn.Module):
    """Encoder, quantizer and decoder as one pure network (init / apply, parameters only).

    Attributes:
      ch, ch_mult, num_res_blocks, z_channels: the convolutional networks; down-sampling is 2^(len(ch_mult) - 1).
      codebook_size, code_dim, bridge, bridge_groups, l2_normalize, search_precision, search_implementation,
        entropy_temperature: see `Quantizer`.
      dtype: compute dtype of encoder, decoder and bridge blocks; latents, codes and losses are float32.
      remat: recompute blocks in the backward pass to save memory.
      mesh: the mesh of a sharded codebook, or None.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    codebook_size: int
    code_dim: int
    bridge: str = "none"
    bridge_groups: str = "2d"
    l2_normalize: bool = False
    search_precision: str = "highest"
    search_implementation: str = "auto"
    entropy_temperature: float | None = None
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Makes the parts."""
        self.encoder = Encoder(self.ch, self.ch_mult, self.num_res_blocks, self.z_channels, self.dtype, self.remat)
        # The layers next to the quantizer are float32: bfloat16 latents would fall onto a coarse grid.
        self.quant_conv = Conv(self.code_dim, kernel_size=1)
        self.quantizer = Quantizer(
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            bridge=self.bridge,
            bridge_groups=self.bridge_groups,
            l2_normalize=self.l2_normalize,
            search_precision=self.search_precision,
            search_implementation=self.search_implementation,
            entropy_temperature=self.entropy_temperature,
            dtype=self.dtype,
            mesh=self.mesh,
        )
        self.post_quant_conv = Conv(self.z_channels, kernel_size=1)
        self.decoder = Decoder(self.ch, self.ch_mult, self.num_res_blocks, self.dtype, self.remat)

    def encode_latent(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w d"]:
        """Images to latents, before quantization, float32."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Float[Array, "b H W 3"]) -> Int[Array, "b h w"]:
        """Images to codes."""
        return self.quantizer.nearest(self.encode_latent(images))

    def decode(self, codes: Int[Array, "b h w"]) -> Float[Array, "b H W 3"]:
        """Codes to images, not clipped."""
        return self.decode_vectors(self.quantizer.look_up(codes))

    def decode_vectors(self, vectors: Float[Array, "b h w d"]) -> Float[Array, "b H W 3"]:
        """Quantized vectors to images, not clipped."""
        return self.decoder(self.post_quant_conv(vectors))

    def bridged_codebook(self) -> Float[Array, "k d"]:
        """The table that is searched."""
        return self.quantizer.bridged_codebook()

    def __call__(self, images: Float[Array, "b H W 3"]) -> TokenizerOutput:
        """Encodes, quantizes and decodes."""
        quantized = self.quantizer(self.encode_latent(images))
        return TokenizerOutput(self.decode_vectors(quantized.vectors), quantized)


def fold_bridge(net: TokenizerNet, params: dict) -> tuple[TokenizerNet, dict]:
    """The same tokenizer without its bridge: a plain VQ network whose codebook is the bridged one.

    Codes and reconstructions are unchanged; this is what inference, evaluation and export use.
    """
    table = net.apply({"params": params}, method="bridged_codebook")
    plain = net.clone(bridge="none", entropy_temperature=None)
    return plain, {**params, "quantizer": {"codebook": table}}
