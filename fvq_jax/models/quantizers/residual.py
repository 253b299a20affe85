"""The residual quantizer: each level quantizes what the levels before it have left of the latent (arXiv 2203.01941)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fvq_jax.models.quantizers.levels import LevelQuantizer
from fvq_jax.runtime.fields import setting


class ResidualQuantizer(LevelQuantizer):
    """Residual quantization: `depth` codes for every latent, all of one table. Codes are [b, h, w, depth].

    The table is bridged, folded, saved and drawn as one. All levels share it, as published for FVQ; or each has rows of
    its own, every `depth`-th, so that all devices hold a part of every level.
    """

    depth: int = setting(4, "Number of levels, that is, of codes for every latent.", above=0, stays=True)
    shared_codebook: bool = setting(
        True,
        "Every level chooses from all codes. With False, level l (from 0) chooses only from its codebook_size / depth "
        "codes l, l + depth, l + 2 depth, ...",
        stays=True,
    )

    @property
    def choices(self) -> int:
        """All codes, or those of a level."""
        return self.codebook_size if self.shared_codebook else self.codebook_size // self.depth

    def check(self, axis: int = 1) -> None:
        """Levels with codes of their own need equally many, which the axis must divide, and no `restart_after`."""
        super().check(axis)
        if self.shared_codebook:
            return
        if self.codebook_size % self.depth:
            raise ValueError(
                f"codebook_size {self.codebook_size} is not a multiple of depth {self.depth}, so levels cannot have "
                "equally many codes of their own: change one of them, or use shared_codebook=True"
            )
        if self.depth == 1:
            raise ValueError("a single level has all codes: use shared_codebook=True, or a larger depth")
        if self.restart_after > 0:
            raise ValueError(
                "restart_after puts codes onto what any level has left: use restart_after=0 or shared_codebook=True"
            )
        self._check_rows(self.choices, "codes of each level", axis)

    @property
    def level_names(self) -> tuple[str, ...]:
        """level_1, level_2, ..."""
        return tuple(f"level_{number + 1}" for number in range(self.depth))

    def level_of(self, h: int, w: int) -> Int[np.ndarray, "h w depth"]:
        """The last axis counts the levels."""
        return np.broadcast_to(np.arange(self.depth), (h, w, self.depth))

    @property
    def description(self) -> str:
        """The bridge, and the number of levels."""
        own = "" if self.shared_codebook else f" of {self.choices:,} codes each"
        return f"{super().description}, {self.depth} levels{own}"

    def code_shape(self, h: int, w: int) -> tuple[int, ...]:
        """A code of every level per latent."""
        return h, w, self.depth

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """All axes but the last, which must be the levels."""
        if len(shape) != 3 or shape[-1] != self.depth or 0 in shape:
            raise ValueError(f"codes must be [b, h, w, {self.depth}]")
        return shape[0], shape[1]

    def architecture(self) -> dict[str, Any]:
        """Sizes, bridge, number of levels; the kind of groups, if the bridge has groups; levels with own codes."""
        own = {} if self.shared_codebook else {"shared_codebook": False}
        return super().architecture() | {"depth": self.depth} | own

    def choose(self, latent: Float[Array, "b h w d"], table: Float[Array, "k d"]) -> Int[Array, "b h w depth"]:
        """The code nearest to the latent, then the one nearest to what it leaves, and so on."""
        rest, codes = latent, []
        for level in range(self.depth):
            if self.shared_codebook:
                codes.append(self.nearest(rest, table))
            else:
                own = table.reshape(self.choices, self.depth, self.code_dim)[:, level]
                codes.append(self.nearest(rest, own) * self.depth + level)
            rest = rest - self.rows(table, codes[-1])
        return jnp.stack(codes, axis=-1)

    def sums(
        self, table: Float[Array, "k d"], codes: Int[Array, "b h w depth"], upto: int
    ) -> Float[Array, "b h w {upto} d"]:
        """The sums of the vectors of the first 1, 2, ..., `upto` levels. Gradients go to the table."""
        return jnp.cumsum(self.rows(table, codes[..., :upto]), axis=-2)

    def by_level(self, codes: Int[Array, "b h w depth"]) -> list[Int[Array, "b h w"]]:
        """The codes of each level."""
        return [codes[..., level] for level in range(self.depth)]
