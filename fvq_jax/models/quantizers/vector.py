"""The vector quantizer: every latent becomes its nearest bridged code (arXiv 1711.00937; with a bridge 2509.10140)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.bridged import BridgedQuantizer
from fvq_jax.models.quantizers.table import TableQuantizer, estimator_setting
from fvq_jax.ops import entropy
from fvq_jax.ops.code_tokens import code_sums
from fvq_jax.ops.region import region_loss, region_targets
from fvq_jax.ops.vectors import l2_normalize
from fvq_jax.ops.vq_losses import codebook_loss, commitment_loss
from fvq_jax.runtime.fields import Needs, setting
from fvq_jax.runtime.mesh import Rules


class VectorQuantizer(BridgedQuantizer):
    """Nearest-neighbour quantization against bridge(codebook), see `BridgedQuantizer`.

    The settings' texts say what they mean. Loss terms: `codebook`, or with a `region_window` the `region` loss instead;
    `commitment`; and `entropy` if its weight is not 0. The region loss needs state: the `age` of every code, in steps
    since it was last chosen.
    """

    l2_normalize: bool = setting(
        False, "Latents and codes are scaled to unit length before they are compared, and codes stay so.", stays=True
    )
    estimator: str = estimator_setting("dynamic")
    entropy_weight: float = setting(0.0, "Weight of the entropy loss; 0 leaves it out, at no cost.")
    entropy_temperature: float = setting(
        0.01,
        "Temperature of the soft assignments of the entropy loss.",
        above=0,
        needs=(Needs(("entropy_weight",)),),
    )
    region_window: int = setting(
        0,
        "Steps without being chosen after which the region loss pulls a code to the latents of chosen ones; "
        "0: codebook loss.",
        stays=True,
        late="the region loss pulls only codes that were never chosen",
    )

    rules: ClassVar[Rules] = (*BridgedQuantizer.rules, (r"age$", P("codebook")))

    def setup(self) -> None:
        """Makes codebook and bridge, and the state of the region loss. At the start all codes count as never chosen."""
        super().setup()
        if self.region_window > 0:
            self.age = self.variable("region", "age", jnp.full, (self.codebook_size,), self.region_window, jnp.int32)

    @property
    def description(self) -> str:
        """The bridge, and whether codes have unit length."""
        return f"bridge {self.bridge}{', unit-length codes' if self.l2_normalize else ''}"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weights of the terms that are computed."""
        pull = "region" if self.region_window > 0 else "codebook"
        weights = {pull: self.codebook_weight, "commitment": self.commitment_weight}
        return weights | ({"entropy": self.entropy_weight} if self.entropy_weight > 0 else {})

    @property
    def streamed_products(self) -> int:
        """Those of the entropy term."""
        return entropy.PRODUCTS if self.entropy_weight > 0 else 0

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms. The codebook is bridged once. `key` is for `restart_after`."""
        bridged = self.bridged()
        table = self._scaled(self.placed(bridged))
        z = self.compared(latent)
        codes = self.nearest(z, table)
        chosen = self.rows(table, codes)
        losses = {"commitment": commitment_loss(z, chosen)}
        if self.region_window > 0:
            losses["region"] = self._region_loss(table, z, codes, train)
        else:
            losses["codebook"] = codebook_loss(z, chosen)
        if self.entropy_weight > 0:
            tokens, temperature = z.reshape(-1, self.code_dim), self.entropy_temperature
            losses["entropy"] = entropy.entropy_loss(tokens, table, temperature=temperature, mesh=self.mesh)
        self.place(bridged, z.reshape(-1, self.code_dim), codes, train, key)
        return Quantized(self.estimated(self.estimator, z, chosen, codes), codes, losses)

    def without_training_state(self) -> "VectorQuantizer":
        """The quantizer without region loss, which alone needs to know when a code was chosen."""
        return self.clone(region_window=0)

    def _region_loss(self, table: Any, z: Any, codes: Any, train: bool) -> Any:
        """The region loss; with `train` all codes age, and those that were chosen are young again."""
        tokens = z.reshape(-1, self.code_dim)
        counts, sums = code_sums(tokens, codes.reshape(-1), self.codebook_size, self.mesh)
        age = jnp.where(counts > 0, 0, jnp.minimum(self.age.value + 1, self.region_window))
        if train and self.is_mutable_collection("region"):
            self.age.value = age
        unseen = age >= self.region_window
        return region_loss(table, *region_targets(table, counts, sums, unseen, len(tokens), self.mesh))

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The bridged codebook, if the bridge has classes that of one; of unit-length rows if `l2_normalize`."""
        return self._scaled(super().table(condition))

    def _scaled(self, vectors: Any) -> Any:
        return l2_normalize(vectors) if self.l2_normalize else vectors

    def architecture(self) -> dict[str, Any]:
        """Sizes, bridge, unit length; and the kind of groups, if the bridge has groups."""
        return super().architecture() | {"l2_normalize": self.l2_normalize}

    @property
    def foldable(self) -> bool:
        """Whether there is a bridge or places, or state that only training needs."""
        return super().foldable or self.region_window > 0

    def folded(self) -> "VectorQuantizer":
        """Without bridge, places, region and entropy loss: its `codebook` is the `table` of this one."""
        return self.clone(bridge="none", entropy_weight=0.0, region_window=0, restart_after=0.0)

    def compared(self, latent: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The latents, of unit length if `l2_normalize`."""
        return self._scaled(latent)


def search_of(quantizer: TableQuantizer) -> VectorQuantizer:
    """A vector quantizer without bridge that searches a codebook as this one searches its table."""
    names = ("codebook_size", "code_dim", "search_precision", "search_implementation", "dtype", "mesh")
    return VectorQuantizer(bridge="none", parent=None, **{name: getattr(quantizer, name) for name in names})
