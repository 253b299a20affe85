"""A quantizer whose codebook is not trained but a moving average: all of its state lies in `variables`."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from fvq_jax.models.quantizers.base import Quantized, Quantizer
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.ops.code_usage import code_histogram
from fvq_jax.ops.estimators import straight_through
from fvq_jax.ops.nearest import nearest_code
from fvq_jax.ops.sharded_codebook import sharded_lookup, sharded_nearest_code
from fvq_jax.ops.vq_losses import commitment_loss
from fvq_jax.runtime.fields import setting


class EmaQuantizer(Quantizer):
    """A code moves towards the mean of its latents; `hits` counts how often it was chosen."""

    codebook_size: int = setting(64, "Number of codes.", above=0, stays=True)
    code_dim: int = setting(8, "Dimension of codes.", above=0, stays=True)
    decay: float = setting(0.9, "Of the moving average.", below=1)

    rules: ClassVar = ((r"codebook$", P("codebook")), (r"hits$", P("codebook")))

    def setup(self):
        shape = (self.codebook_size, self.code_dim)
        self.codebook = self.variable("moving", "codebook", lambda: jax.random.normal(self.make_rng("params"), shape))
        self.hits = self.variable("moving", "hits", jnp.zeros, (self.codebook_size,), jnp.int32)

    @property
    def size(self):
        return self.codebook_size

    @property
    def latent_dim(self):
        return self.code_dim

    @property
    def description(self):
        return f"moving averages of {self.decay}"

    @property
    def loss_weights(self):
        return {"commitment": 0.25}

    def code_shape(self, h, w):
        return h, w

    def check(self, axis=1):
        if self.codebook_size % axis:
            raise ValueError(f"mesh.codebook {axis} does not divide {self.codebook_size} codes")

    def __call__(self, latent, *, train=False, key=None):
        table = self.codebook.value
        codes = self.encode(latent)
        chosen = self.decode(codes)
        if train and self.is_mutable_collection("moving"):
            counts, flat = (
                code_histogram(codes, self.codebook_size),
                jax.lax.stop_gradient(latent).reshape(-1, self.code_dim),
            )
            sums = jnp.zeros_like(table).at[codes.reshape(-1)].add(flat)
            mean = sums / jnp.maximum(counts, 1)[:, None]
            self.codebook.value = jnp.where(counts[:, None] > 0, self.decay * table + (1 - self.decay) * mean, table)
            self.hits.value += counts
        return Quantized(straight_through(latent, chosen), codes, {"commitment": commitment_loss(latent, chosen)})

    def encode(self, latent):
        flat, table = latent.reshape(-1, self.code_dim), self.codebook.value
        codes = nearest_code(flat, table) if self.mesh is None else sharded_nearest_code(flat, table, self.mesh)
        return codes.reshape(latent.shape[:-1])

    def decode(self, codes, upto=None):
        flat, table = codes.reshape(-1), self.codebook.value
        rows = table[flat] if self.mesh is None else sharded_lookup(flat, table, self.mesh)
        return rows.reshape(*codes.shape, self.code_dim)

    def table(self, condition=None):
        return self.codebook.value

    def counts(self, codes):
        return code_histogram(codes, self.codebook_size)[None]

    def architecture(self):
        return {"codebook_size": self.codebook_size, "code_dim": self.code_dim}

    @property
    def foldable(self):
        return True

    def folded(self):
        plain = {"codebook_size": self.codebook_size, "code_dim": self.code_dim, "bridge": "none"}
        return VectorQuantizer(**plain, dtype=self.dtype, mesh=self.mesh, parent=None)
