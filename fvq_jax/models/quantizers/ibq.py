"""IBQ, index backpropagation quantization: every choice of a code trains all codes (arXiv 2412.02692)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.bridged import BridgedQuantizer
from fvq_jax.ops import entropy, index_gradient
from fvq_jax.ops.vq_losses import codebook_loss, commitment_loss
from fvq_jax.runtime.fields import Needs, setting, settings_of


class IBQuantizer(BridgedQuantizer):
    """The code with the largest inner product with the latent; of equal ones the first.

    There is no straight-through estimator. The gradient of a vector reaches the chosen code. It also reaches the latent
    and all codes, as if softmax(z.e) over all codes e had made the choice. Loss terms:

      index: mean of |vector - z|^2, with that gradient of the vector and with the gradient to z.
      codebook, commitment: as for the vector quantizer.
      entropy: of softmax(z.e / entropy_temperature), if its weight is not 0.
    """

    bridge: str = setting("none", settings_of(BridgedQuantizer)["bridge"].text, stays=True)
    search_implementation: str = setting(
        "auto", "Program of the search: auto, one for the device at hand; xla, a scan.", choices=("auto", "xla")
    )
    init_std: float = setting(1.0, "Standard deviation of a fresh codebook, which is normal then; 0: uniform in +-1/k.")
    index_weight: float = setting(1.0, "Weight of the index loss, which pulls latents and all codes to each other.")
    codebook_weight: float = setting(0.25, "Weight of the codebook loss, which pulls codes to latents.")
    commitment_weight: float = setting(1.0, "Weight of the commitment loss, which pulls latents to their codes.")
    entropy_weight: float = setting(0.05, "Weight of the entropy loss; 0 leaves it out, at no cost.")
    entropy_temperature: float = setting(
        0.01,
        "Temperature of the soft assignments of the entropy loss.",
        above=0,
        needs=(Needs(("entropy_weight",)),),
    )

    @property
    def description(self) -> str:
        """The bridge."""
        return f"IBQ, bridge {self.bridge}"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weights of the terms that are computed."""
        weights = {"index": self.index_weight, **super().loss_weights}
        return weights | ({"entropy": self.entropy_weight} if self.entropy_weight > 0 else {})

    @property
    def streamed_products(self) -> int:
        """Those of the gradient by way of the index and of the entropy term."""
        return index_gradient.PRODUCTS + (entropy.PRODUCTS if self.entropy_weight > 0 else 0)

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms. The codebook is bridged once. `key` is for `restart_after`."""
        bridged = self.bridged()
        table = self.placed(bridged)
        codes = self.nearest(latent, table, inner_product=True)
        chosen, z = self.rows(table, codes).reshape(-1, self.code_dim), latent.reshape(-1, self.code_dim)
        vectors = index_gradient.with_index_gradient(chosen, z, table, mesh=self.mesh)
        losses = {
            "index": jnp.mean(jnp.square(vectors - z)),
            "codebook": codebook_loss(z, chosen),
            "commitment": commitment_loss(z, chosen),
        }
        if self.entropy_weight > 0:
            losses["entropy"] = entropy.entropy_loss(
                z, table, temperature=self.entropy_temperature, inner_product=True, mesh=self.mesh
            )
        self.place(bridged, z, codes, train, key)
        return Quantized(vectors.reshape(latent.shape), codes, losses)

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The index of the bridged code with the largest inner product with every latent."""
        return self.nearest(latent, self.table(), inner_product=True)

    def folded(self) -> "IBQuantizer":
        """The same without bridge, places and entropy term: its parameter `codebook` is the `table` of this one."""
        return self.clone(bridge="none", entropy_weight=0.0, restart_after=0.0)
