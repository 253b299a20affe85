"""BSQ, binary spherical quantization: the signs of a latent of unit length (arXiv 2406.07548)."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.lattice import BinaryQuantizer
from fvq_jax.ops.bit_entropy import bitwise_entropy_loss
from fvq_jax.ops.estimators import straight_through
from fvq_jax.ops.vectors import l2_normalize
from fvq_jax.runtime.fields import Needs, setting


class BSQuantizer(BinaryQuantizer):
    """Vectors of unit length whose channels are all 1/sqrt(bits) or -1/sqrt(bits); the last channel counts 1.

    The gradient passes straight through to u, the latent scaled to unit length. Loss term: `entropy` if its weight is
    not 0. A bit is 1 with probability sigmoid(4 u_i / (sqrt(bits) temperature)). The loss is the sum over all bits of
    the mean entropy of a bit minus the entropy of its mean probability, over the tokens of all devices.
    """

    temperature: float = setting(
        1.0, "Temperature of the soft bits of the entropy loss.", above=0, needs=(Needs(("entropy_weight",)),)
    )

    @property
    def description(self) -> str:
        """What a code is."""
        return "BSQ, the signs of unit-length latents"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of the entropy, if that is computed."""
        return {"entropy": self.entropy_weight} if self.entropy_weight > 0 else {}

    @property
    def bit_values(self) -> Int[np.ndarray, "bits"]:
        """The last channel is the lowest bit."""
        return 2 ** np.arange(self.bits, dtype=np.int32)[::-1]

    @property
    def length(self) -> float:
        """1/sqrt(bits)."""
        return 1 / math.sqrt(self.bits)

    def compared(self, latent: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The latents, of unit length."""
        return l2_normalize(latent)

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss term. Nothing is random, and there is no state."""
        direction = self.compared(latent)
        codes = self.encode(latent)
        losses = {}
        if self.entropy_weight > 0:
            logits = 4 * self.length / self.temperature * direction.reshape(-1, self.bits)
            losses["entropy"] = bitwise_entropy_loss(logits)
        return Quantized(straight_through(direction, self.decode(codes)), codes, losses)
