"""A codebook that is not trained but follows the latents as a moving average (arXiv 1711.00937, appendix A.1)."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.table import TableQuantizer, estimator_setting
from fvq_jax.models.quantizers.vector import VectorQuantizer, search_of
from fvq_jax.ops.code_tokens import code_sums, random_tokens
from fvq_jax.ops.vq_losses import commitment_loss
from fvq_jax.runtime.fields import setting
from fvq_jax.runtime.mesh import Rules

EPSILON = 1e-5  # hits that are added to those of every code, as published


class EMAQuantizer(TableQuantizer):
    """Nearest-neighbour quantization; every code is a moving average of the latents that chose it.

    State, divided by rows: `codebook`, and for every code the moving averages over training steps of its `hits` and of
    the sum of its latents, `sums`. A step searches and looks up first and moves the averages afterwards, over the
    tokens of all devices. hits and sums start at 0, so a code stays where it is until a latent chooses it. The only
    loss term is `commitment`.

    A code with few hits is dead and is put onto a random latent of the batch, as if it had been chosen as often as the
    average code. Published limits count hits per step, which depend on batch and codebook; this one is a part of the
    average. The published codes come back at the limit itself and are put elsewhere after the next step.
    """

    decay: float = setting(0.99, "Factor by which the moving averages forget in every step.", below=1)
    restart_below: float = setting(
        0.1, "A code with fewer hits than this part of the average is put onto a random latent; 0: never.", below=1
    )
    init_std: float = setting(1.0, "Standard deviation of a fresh codebook, which is normal.", above=0)
    estimator: str = estimator_setting("dynamic")

    trained: ClassVar[bool] = False
    rules: ClassVar[Rules] = ((r"(codebook|hits|sums)$", P("codebook")),)

    def setup(self) -> None:
        """Makes the state."""
        shape = (self.codebook_size, self.code_dim)

        def fresh() -> Array:
            return self.init_std * jax.random.normal(self.make_rng("params"), shape, jnp.float32)

        self.codebook = self.variable("moving", "codebook", fresh)
        self.hits = self.variable("moving", "hits", jnp.zeros, shape[:1], jnp.float32)
        self.sums = self.variable("moving", "sums", jnp.zeros, shape, jnp.float32)

    @property
    def description(self) -> str:
        """The decay."""
        return f"moving averages of {self.decay:g}"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of the only term."""
        return {"commitment": self.commitment_weight}

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss term; with `train` it moves the averages. ValueError if `key` is missing then."""
        codes = self.encode(latent)
        chosen = self.decode(codes)
        if train and self.is_mutable_collection("moving"):
            if key is None and self.restart_below > 0:
                raise ValueError("training with restart_below > 0 draws random latents: give a key")
            self._move(latent.reshape(-1, self.code_dim), codes.reshape(-1), key)
        vectors = self.estimated(self.estimator, latent, chosen, codes)
        return Quantized(vectors, codes, {"commitment": commitment_loss(latent, chosen)})

    def _move(self, z, codes, key):
        counts, sums = code_sums(z, codes, self.codebook_size, self.mesh)
        hits = self.decay * self.hits.value + (1 - self.decay) * counts
        sums = self.decay * self.sums.value + (1 - self.decay) * sums
        total = jnp.sum(hits)
        smoothed = (hits + EPSILON) / (total + self.codebook_size * EPSILON) * total
        codebook = jnp.where(hits[:, None] > 0, sums / smoothed[:, None], self.codebook.value)
        if self.restart_below > 0:
            average = total / self.codebook_size
            dead = hits < self.restart_below * average
            start = random_tokens(z, key, self.codebook_size, self.mesh)
            codebook = jnp.where(dead[:, None], start, codebook)
            sums = jnp.where(dead[:, None], start * average, sums)
            hits = jnp.where(dead, average, hits)
        self.codebook.value, self.hits.value, self.sums.value = codebook, hits, sums

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The codebook."""
        self.refuse(condition)
        return self.codebook.value

    @property
    def foldable(self) -> bool:
        """Always: the codebook remains, and the averages are left out."""
        return True

    def folded(self) -> VectorQuantizer:
        """A vector quantizer with the same codebook."""
        return search_of(self)
