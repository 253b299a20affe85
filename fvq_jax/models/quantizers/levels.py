"""What quantizers with levels have in common: a latent is replaced by a sum of vectors, one of every level.

Each level is searched for what the levels before it have left over. The file of a variant says how that is done.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.bridged import BridgedQuantizer
from fvq_jax.models.quantizers.table import estimator_setting
from fvq_jax.ops.code_usage import code_histogram
from fvq_jax.ops.estimators import ESTIMATORS
from fvq_jax.ops.vq_losses import codebook_loss, commitment_loss


class LevelQuantizer(BridgedQuantizer):
    """Sums of codes of one table; the gradient passes to the latent from the whole sum.

    Both losses, `codebook` and `commitment`, are means over the sums of the first 1, 2, ... levels. So a code is pulled
    by its own level and by all later ones.

    A variant defines `level_names`, `level_of`, `choose`, `sums` and `by_level`.
    """

    estimator: str = estimator_setting()

    @property
    def levels(self) -> int:
        """How many vectors are added up."""
        return len(self.level_names)

    def choose(self, latent: Float[Array, "b h w d"], table: Float[Array, "k d"]) -> Int[Array, "b ..."]:
        """The codes of all levels, level by level."""
        raise NotImplementedError

    def sums(self, table: Float[Array, "k d"], codes: Int[Array, "b ..."], upto: int) -> Float[Array, "b h w {upto} d"]:
        """The sums of the vectors of the first 1, 2, ..., `upto` levels. Gradients go to the table."""
        raise NotImplementedError

    def by_level(self, codes: Int[Array, "b ..."]) -> list[Int[Array, "b ..."]]:
        """The codes of each level."""
        raise NotImplementedError

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms. The codebook is bridged once. `key` is for `restart_after`."""
        bridged = self.bridged()
        table = self.placed(bridged)
        codes = self._chosen(latent, table)
        # The rows are looked up a second time, for all levels at once: their gradients reach the table in a single
        # scatter-add, and are summed over the devices once, not once per level.
        sums = self.sums(table, codes, self.levels)
        wanted = jnp.broadcast_to(latent[..., None, :], sums.shape)
        losses = {"codebook": codebook_loss(wanted, sums), "commitment": commitment_loss(wanted, sums)}
        if self.restart_after > 0:
            rest = wanted - jnp.concatenate([jnp.zeros_like(sums[..., :1, :]), sums[..., :-1, :]], axis=-2)
            self.place(bridged, rest.reshape(-1, self.code_dim), codes, train, key)
        return Quantized(ESTIMATORS[self.estimator](latent, sums[..., -1, :]), codes, losses)

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b ..."]:
        """The codes alone; no gradient."""
        return self._chosen(latent, self.table())

    def decode(self, codes: Int[Array, "b ..."], upto: int | None = None) -> Float[Array, "b h w d"]:
        """The sum of the vectors of the first `upto` levels (None: all). ValueError for another number of levels."""
        if upto is not None and not 1 <= upto <= self.levels:
            raise ValueError(f"upto must be from 1 to {self.levels}, the number of levels, not {upto}")
        return self.sums(self.table(), codes, self.levels if upto is None else upto)[..., -1, :]

    def counts(self, codes: Int[Array, "b ..."]) -> Int[Array, "levels k"]:
        """How often each code was chosen in each level."""
        return jnp.stack([code_histogram(level, self.codebook_size) for level in self.by_level(codes)])

    def _chosen(self, latent: Any, table: Any) -> Any:
        return self.choose(*jax.lax.stop_gradient((latent, table)))
