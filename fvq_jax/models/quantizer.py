"""The vector quantizer: holds codebook and bridge, replaces every latent by its nearest bridged code."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fvq_jax.models.bridge import make_bridge
from fvq_jax.ops import quantize
from fvq_jax.ops.entropy import entropy_loss
from fvq_jax.ops.nearest import nearest_code
from fvq_jax.ops.sharded_codebook import sharded_lookup, sharded_nearest_code
from fvq_jax.ops.vectors import l2_normalize


@struct.dataclass
class Quantized:
    """What quantizing a grid of latents gives.

    Attributes:
      vectors: float32 [b, h, w, d], the chosen codes with the straight-through gradient to the latents.
      codes: int32 [b, h, w].
      codebook_loss, commitment_loss, entropy_loss: scalars, unweighted; entropy_loss is 0 when it is off.
    """

    vectors: Any
    codes: Any
    codebook_loss: Any
    commitment_loss: Any
    entropy_loss: Any


class Quantizer(nn.Module):
    """Nearest-neighbour quantization against bridge(codebook).

    Attributes:
      codebook_size, code_dim: k and d.
      bridge, bridge_groups: see `models/bridge.py`.
      l2_normalize: latents and codes are scaled to unit length before they are compared, and codes stay so.
      search_precision, search_implementation: see `ops/nearest.py`.
      entropy_temperature: of the entropy term; None leaves the term out, at no cost.
      dtype: compute dtype of the bridge's blocks. Everything else is float32.
      mesh: a mesh with axes `data` and `codebook` for the sharded search; None for a single device.
    """

    codebook_size: int
    code_dim: int
    bridge: str = "none"
    bridge_groups: str = "2d"
    l2_normalize: bool = False
    search_precision: str = "highest"
    search_implementation: str = "auto"
    entropy_temperature: float | None = None
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Makes the codebook, uniform in +-1/k as published, and the bridge."""

        def uniform(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -1 / self.codebook_size, 1 / self.codebook_size)

        self.codebook = self.param("codebook", uniform, (self.codebook_size, self.code_dim))
        self.bridge_net = make_bridge(self.bridge, self.bridge_groups, self.dtype)

    def bridged_codebook(self) -> Float[Array, "k d"]:
        """The table that is searched; of unit-length rows if `l2_normalize`."""
        table = self.codebook if self.bridge_net is None else self.bridge_net(self.codebook)
        return l2_normalize(table) if self.l2_normalize else table

    def look_up(self, codes: Int[Array, "b h w"]) -> Float[Array, "b h w d"]:
        """The bridged codes at these indices."""
        return self._rows(self.bridged_codebook(), codes)

    def nearest(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The index of the nearest bridged code for every latent."""
        return self._search(latent, self.bridged_codebook())

    def __call__(self, latent: Float[Array, "b h w d"]) -> Quantized:
        """Quantizes, with the loss terms. The codebook is bridged once."""
        table = self.bridged_codebook()
        codes = self._search(latent, table)
        chosen = self._rows(table, codes)
        z = l2_normalize(latent) if self.l2_normalize else latent
        entropy_term = jnp.zeros((), jnp.float32)
        if self.entropy_temperature is not None:
            tokens = z.reshape(-1, self.code_dim)
            entropy_term = entropy_loss(tokens, table, temperature=self.entropy_temperature, mesh=self.mesh)
        return Quantized(
            vectors=quantize.straight_through(z, chosen),
            codes=codes,
            codebook_loss=quantize.codebook_loss(z, chosen),
            commitment_loss=quantize.commitment_loss(z, chosen),
            entropy_loss=entropy_term,
        )

    def _search(self, latent, table):
        flat = latent.reshape(-1, self.code_dim)
        if self.l2_normalize:  # as the table is already
            flat = l2_normalize(flat)
        options = {"precision": self.search_precision, "implementation": self.search_implementation}
        if self.mesh is None:
            codes = nearest_code(flat, table, **options)
        else:
            codes = sharded_nearest_code(flat, table, self.mesh, **options)
        return codes.reshape(latent.shape[:-1])

    def _rows(self, table, codes):
        flat = codes.reshape(-1)
        rows = table[flat] if self.mesh is None else sharded_lookup(flat, table, self.mesh)
        return rows.reshape(*codes.shape, self.code_dim)
