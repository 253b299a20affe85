"""The tokenizer network: encoder, quantizer, decoder. Images are [b, H, W, 3] in [-1, 1]."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.decoder import Decoder
from fvq_jax.models.encoder import Encoder
from fvq_jax.models.layers import Conv
from fvq_jax.models.quantizers.base import Quantizer


@struct.dataclass
class TokenizerOutput:
    """A forward pass.

    Attributes:
      reconstruction: float32 [b, H, W, 3], not clipped.
      quantized: what the quantizer returned, `Quantized`.
      error: float32 [b], the quantization error of every image, see `quantization_error`.
      power: float32 [b], the mean over its latents of their squared length, of which the error is a part.
    """

    reconstruction: Any
    quantized: Any
    error: Any
    power: Any


class TokenizerNet(nn.Module):
    """Encoder, quantizer and decoder as one pure network.

    Attributes:
      quantizer: any variant of `models.quantizers`.
      ch, ch_mult, num_res_blocks, z_channels: the convolutional networks; down-sampling is 2^(len(ch_mult) - 1).
      dtype: compute dtype of encoder and decoder; latents, codes and losses are float32.
      remat: recompute blocks in the backward pass to save memory.
      attention_levels: the levels with attention blocks, counted from 0, full resolution; -1 is the lowest.
      quant_kernel: side of the kernels of the convolutions in front of the quantizer and behind it.
    """

    quantizer: Quantizer
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention_levels: tuple[int, ...] = (-1,)
    quant_kernel: int = 1

    def setup(self) -> None:
        """Makes the parts."""
        common: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat, "attention_levels": self.attention_levels}
        self.encoder = Encoder(self.ch, self.ch_mult, self.num_res_blocks, self.z_channels, **common)
        # The layers next to the quantizer are float32: bfloat16 latents would fall onto a coarse grid.
        self.quant_conv = Conv(self.quantizer.latent_dim, kernel_size=self.quant_kernel)
        self.post_quant_conv = Conv(self.z_channels, kernel_size=self.quant_kernel)
        self.decoder = Decoder(self.ch, self.ch_mult, self.num_res_blocks, **common)

    @property
    def downsampling(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    def encode_latent(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w d"]:
        """Images to latents, before quantization, float32."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Float[Array, "b H W 3"]) -> Int[Array, "b ..."]:
        """Images to codes."""
        return self.quantizer.encode(self.encode_latent(images))

    def decode(self, codes: Int[Array, "b ..."], upto: int | None = None) -> Float[Array, "b H W 3"]:
        """Codes to images, not clipped; `upto` as for `Quantizer.decode`."""
        return self.decode_vectors(self.quantizer.decode(codes, upto))

    def decode_vectors(self, vectors: Float[Array, "b h w d"]) -> Float[Array, "b H W 3"]:
        """Quantized vectors to images, not clipped."""
        return self.decoder(self.post_quant_conv(vectors))

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"] | None:
        """The table of vectors that the quantizer searches (see `Quantizer.table`); None if it has no table."""
        return self.quantizer.table(condition)

    def __call__(
        self, images: Float[Array, "b H W 3"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> TokenizerOutput:
        """Encodes, quantizes and decodes; `train` and `key` are passed to the quantizer."""
        latent = self.encode_latent(images)
        quantized = self.quantizer(latent, train=train, key=key)
        error, power = quantization_error(self.quantizer.compared(latent), quantized.vectors)
        return TokenizerOutput(self.decode_vectors(quantized.vectors), quantized, error, power)


def quantization_error(
    latent: Float[Array, "b h w d"], vectors: Float[Array, "b h w d"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Per image, the means over latents of |z - q|^2 and of |z|^2, summed over the channels; no gradient."""
    latent, vectors = jax.lax.stop_gradient((latent, vectors))

    def mean_square(x):
        return jnp.mean(jnp.sum(jnp.square(x), axis=-1), axis=(1, 2))

    return mean_square(latent - vectors), mean_square(latent)


def fold(net: TokenizerNet, variables: dict[str, Any]) -> tuple[TokenizerNet, dict[str, Any]]:
    """The same tokenizer for use after training: the table that its quantizer searches replaces codebook and bridge.

    Codes and reconstructions are unchanged; inference, evaluation and export use the result. `variables` are the
    parameters and the state, if any. A quantizer that is not foldable keeps its parameters and state. With a quantizer
    that has a table per class the result is the tokenizer of no class.
    """
    plain = net.clone(quantizer=net.quantizer.folded())
    if not net.quantizer.foldable:
        return plain, variables
    table = net.apply(variables, method="table")
    params = variables["params"]
    folded = net.quantizer.folded_params(params.get("quantizer", {}), table)
    return plain, {"params": {**params, "quantizer": folded}}
