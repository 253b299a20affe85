"""FSQ, finite scalar quantization: every channel is squashed into a range and rounded (arXiv 2309.15505)."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized
from fvq_jax.models.quantizers.lattice import MOST_CODES, LatticeQuantizer, channels
from fvq_jax.ops.estimators import straight_through
from fvq_jax.runtime.fields import setting

MARGIN = 1e-3  # keeps the range below the point where one more value would be reached by rounding


class FSQuantizer(LatticeQuantizer):
    """Channel i becomes one of `levels[i]` evenly spaced values in [-1, 1]; a code counts all of them. No loss terms.

    With L values, a channel z is squashed to b = tanh(z + s) h - o, where h = (L - 1) (1 - MARGIN) / 2, and o is 0.5
    if L is even and 0 if it is odd; the shift s makes 0 stay 0. The value is round(b) / (L // 2), where the middle
    between two whole numbers goes to the even one. The gradient is that of b / (L // 2), as if b was not rounded.
    """

    levels: tuple[int, ...] = setting(
        (8, 8, 8, 6, 5),
        "How many values each channel has, 3 or more; their product is the number of codes.",
        stays=True,
    )

    @property
    def size(self) -> int:
        """The product of all levels."""
        return math.prod(self.levels)

    @property
    def latent_dim(self) -> int:
        """One channel for each of the levels."""
        return len(self.levels)

    @property
    def description(self) -> str:
        """The levels."""
        return f"FSQ, levels {' '.join(map(str, self.levels))}"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """There are no loss terms."""
        return {}

    def check(self, axis: int = 1) -> None:
        """There must be levels, each of 3 values or more, and not too many codes; any axis fits."""
        # With 2 values, no finite shift would make 0 stay 0.
        if not self.levels or not all(isinstance(level, int) and level >= 3 for level in self.levels):
            raise ValueError(f"levels {self.levels} must be whole numbers of 3 or more, for instance (8, 5, 5)")
        if self.size > MOST_CODES:
            raise ValueError(
                f"levels {self.levels} make {self.size} codes: use fewer or smaller ones with a product of at most "
                f"{MOST_CODES}, since the use of each code is counted"
            )

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes. Nothing is random, and there is no state."""
        codes = self._codes(self._squashed(latent))
        return Quantized(straight_through(self.compared(latent), self.decode(codes)), codes, {})

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The codes alone: the number of each channel's value, counted from the lowest, times the levels before it."""
        return self._codes(self._squashed(latent))

    def decode(self, codes: Int[Array, "b h w"], upto: int | None = None) -> Float[Array, "b h w d"]:
        """The values of every channel. ValueError for an `upto`: there are no levels of codes."""
        self.refuse_levels(upto)
        numbers = codes[..., None] // self._steps % channels(np.asarray(self.levels, np.int32))
        return (numbers - self._middle).astype(jnp.float32) / self._middle.astype(np.float32)

    def compared(self, latent: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """The squashed latents, before they are rounded, in the unit of the vectors."""
        return self._squashed(latent) / self._middle

    def architecture(self) -> dict[str, Any]:
        """The levels."""
        return {"levels": self.levels}

    @property
    def _middle(self) -> Int[np.ndarray, "1 1 1 d"]:
        """Number of the value 0 of each channel."""
        return channels(np.asarray(self.levels, np.int32) // 2)

    @property
    def _steps(self) -> Int[np.ndarray, "1 1 1 d"]:
        """How much a code grows if the number of a channel's value grows by 1."""
        return channels(np.cumprod((1, *self.levels[:-1]), dtype=np.int32))

    def _squashed(self, latent: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        levels = channels(np.asarray(self.levels))
        half = (levels - 1) * (1 - MARGIN) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift, scale, below = (x.astype(np.float32) for x in (np.arctanh(offset / half), half, offset))
        return jnp.tanh(latent + shift) * scale - below

    def _codes(self, squashed: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        numbers = jnp.round(squashed).astype(jnp.int32) + self._middle
        return jnp.sum(numbers * self._steps, axis=-1, dtype=jnp.int32)
