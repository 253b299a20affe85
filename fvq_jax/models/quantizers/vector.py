"""The vector quantizer: every latent becomes its nearest bridged code (arXiv 1711.00937; with a bridge 2509.10140)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.table import TableQuantizer
from fvq_jax.ops.entropy import entropy_loss
from fvq_jax.ops.estimators import ESTIMATORS
from fvq_jax.ops.vectors import l2_normalize
from fvq_jax.ops.vq_losses import codebook_loss, commitment_loss
from fvq_jax.runtime.fields import setting


class VectorQuantizer(TableQuantizer):
    """Nearest-neighbour quantization against bridge(codebook).

    The settings' texts say what they mean. Loss terms: `codebook`, `commitment`, and `entropy` if its weight is not 0.
    """

    l2_normalize: bool = setting(
        False, "Latents and codes are scaled to unit length before they are compared, and codes stay so.", stays=True
    )
    estimator: str = setting(
        "straight_through",
        "How the gradient passes from vectors to latents; rotation wants codes about as long as latents, see init_std.",
        choices=tuple(ESTIMATORS),
    )
    entropy_weight: float = setting(0.0, "Weight of the entropy loss; 0 leaves it out, at no cost.")
    entropy_temperature: float = setting(0.01, "Temperature of the soft assignments of the entropy loss.", above=0)

    @property
    def description(self) -> str:
        """The bridge, and whether codes have unit length."""
        return f"bridge {self.bridge}{', unit-length codes' if self.l2_normalize else ''}"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weights of the terms that are computed."""
        weights = {"codebook": self.codebook_weight, "commitment": self.commitment_weight}
        return weights | ({"entropy": self.entropy_weight} if self.entropy_weight > 0 else {})

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms. The codebook is bridged once; nothing is random, and there is no state."""
        table = self.table()
        z = self.compared(latent)
        codes = self.nearest(z, table)
        chosen = self.rows(table, codes)
        losses = {"codebook": codebook_loss(z, chosen), "commitment": commitment_loss(z, chosen)}
        if self.entropy_weight > 0:
            tokens = z.reshape(-1, self.code_dim)
            losses["entropy"] = entropy_loss(tokens, table, temperature=self.entropy_temperature, mesh=self.mesh)
        return Quantized(ESTIMATORS[self.estimator](z, chosen), codes, losses)

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The index of the nearest bridged code for every latent."""
        return self.nearest(self.compared(latent), self.table())

    def decode(self, codes: Int[Array, "b h w"], upto: int | None = None) -> Float[Array, "b h w d"]:
        """The bridged codes at these indices. ValueError for an `upto`: there are no levels."""
        if upto is not None:
            raise ValueError("a vector quantizer has a single level: leave upto out")
        return self.rows(self.table(), codes)

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The bridged codebook, if the bridge has classes that of one; of unit-length rows if `l2_normalize`."""
        table = super().table(condition)
        return l2_normalize(table) if self.l2_normalize else table

    def architecture(self) -> dict[str, Any]:
        """Sizes, bridge, unit length; and the kind of groups, if the bridge has groups."""
        return super().architecture() | {"l2_normalize": self.l2_normalize}

    def folded(self) -> "VectorQuantizer":
        """The same without bridge and entropy term: its parameter `codebook` is the `table` of this one."""
        return self.clone(bridge="none", entropy_weight=0.0)

    def compared(self, latent: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The latents, of unit length if `l2_normalize`."""
        return l2_normalize(latent) if self.l2_normalize else latent
