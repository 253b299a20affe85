"""LFQ, lookup-free quantization: a code is the signs of a latent (arXiv 2310.05737, bits as in arXiv 2409.04410)."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.lattice import BinaryQuantizer
from fvq_jax.ops import bit_entropy
from fvq_jax.ops.estimators import straight_through
from fvq_jax.ops.nearest import PASSES
from fvq_jax.ops.vq_losses import commitment_loss
from fvq_jax.runtime.fields import Needs, setting


class LFQuantizer(BinaryQuantizer):
    """Vectors of 1 and -1, with the straight-through estimator; channel i is bit i, the first one counts 1.

    Loss terms: `commitment`, and `entropy` if its weight is not 0. That is the mean entropy of softmax(2 z.c /
    temperature) over all codes c, minus the entropy of the mean of these probabilities over the tokens of all devices.
    """

    commitment_weight: float = setting(0.25, "Weight of the commitment loss, which pulls latents to their codes.")
    temperature: float = setting(
        0.01, "Temperature of the soft assignments of the entropy loss.", above=0, needs=(Needs(("entropy_weight",)),)
    )

    @property
    def description(self) -> str:
        """What a code is."""
        return "LFQ, the signs of latents"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weights of the terms that are computed."""
        weights = {"commitment": self.commitment_weight}
        return weights | ({"entropy": self.entropy_weight} if self.entropy_weight > 0 else {})

    @property
    def bit_values(self) -> Int[np.ndarray, "bits"]:
        """The first channel is the lowest bit."""
        return 2 ** np.arange(self.bits, dtype=np.int32)

    @property
    def length(self) -> float:
        """1."""
        return 1.0

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms. Nothing is random, and there is no state."""
        codes = self.encode(latent)
        chosen = self.decode(codes)
        losses = {"commitment": commitment_loss(latent, chosen)}
        if self.entropy_weight > 0:
            # Channels are independent: of 1 against -1, the logits differ by 4 z / temperature.
            logits = 4 / self.temperature * latent.reshape(-1, self.bits)
            losses["entropy"] = bit_entropy.joint_entropy_loss(logits, mesh=self.mesh)
        return Quantized(straight_through(latent, chosen), codes, losses)

    def uncounted_flops(self, tokens: int, platform: str) -> tuple[float, float]:
        """Of the products of the entropy term, a block of tokens after another, all but the first block."""
        if self.entropy_weight == 0:
            return 0.0, 1.0
        blocks = max(tokens / (1 if self.mesh is None else self.mesh.size) / bit_entropy.BLOCK_SIZE, 1)
        flops = bit_entropy.PRODUCTS * 2.0 * tokens * self.size * (1 - 1 / blocks)
        return flops, 1.0 if platform == "cpu" else float(PASSES["highest"])
