"""SimVQ: a codebook that is never trained, under one linear layer that is (arXiv 2411.02038)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.table import TableQuantizer, estimator_setting
from fvq_jax.models.quantizers.vector import VectorQuantizer, search_of
from fvq_jax.ops.vq_losses import codebook_loss, commitment_loss
from fvq_jax.runtime.fields import setting
from fvq_jax.runtime.mesh import Rules


class SimVQuantizer(TableQuantizer):
    """Nearest-neighbour quantization against one linear layer of fixed random vectors.

    The vectors are normal, by default with variance 1/d, kept as state, and never change: every step moves all codes by
    way of the layer, whose weights and biases start uniform in +-d^-1/2. `vector` with the bridge `linear` is the same
    network with a codebook that is trained too. Loss terms: `codebook`, `commitment`.
    """

    codebook_weight: float = setting(1.0, "Weight of the codebook loss, which pulls the layer's results to latents.")
    init_std: float = setting(
        0.0, "Standard deviation of the fixed vectors, which are normal; 0: code_dim^-0.5, as published."
    )
    estimator: str = estimator_setting("dynamic")

    rules: ClassVar[Rules] = ((r"codebook$", P("codebook")), (r"layer/", P()))

    def setup(self) -> None:
        """Makes the fixed vectors and the layer."""
        shape, scale = (self.codebook_size, self.code_dim), self.code_dim**-0.5

        def fixed() -> Array:
            return (self.init_std or scale) * jax.random.normal(self.make_rng("params"), shape, jnp.float32)

        def uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -scale, scale)

        self.codebook = self.variable("fixed", "codebook", fixed)
        self.layer = nn.Dense(
            self.code_dim, precision=jax.lax.Precision.HIGHEST, kernel_init=uniform, bias_init=uniform
        )

    @property
    def description(self) -> str:
        """Its name."""
        return "SimVQ"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weights of both terms."""
        return {"codebook": self.codebook_weight, "commitment": self.commitment_weight}

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms. Nothing is random, and the state never changes."""
        table = self.table()
        codes = self.nearest(latent, table)
        chosen = self.rows(table, codes)
        losses = {"codebook": codebook_loss(latent, chosen), "commitment": commitment_loss(latent, chosen)}
        return Quantized(self.estimated(self.estimator, latent, chosen, codes), codes, losses)

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The layer's results for all fixed vectors."""
        self.refuse(condition)
        return self.layer(self.codebook.value)

    @property
    def foldable(self) -> bool:
        """Always: the table replaces vectors and layer."""
        return True

    def folded(self) -> VectorQuantizer:
        """A vector quantizer whose codebook is the table of this one."""
        return search_of(self)
