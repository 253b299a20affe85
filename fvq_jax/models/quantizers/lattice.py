"""The common part of quantizers whose vectors form a fixed lattice: nothing is searched, and nothing is trained.

A code follows from its latent channel by channel. So there is no table, all devices work on their own latents, and the
axis `codebook` divides only the batch.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.runtime.fields import setting

MOST_CODES = 2**24  # a histogram of all codes is kept


def channels(values: Shaped[np.ndarray, "d"]) -> Shaped[np.ndarray, "1 1 1 d"]:
    """A number for every channel of latents [b, h, w, d]."""
    return values[None, None, None]


class LatticeQuantizer(Quantizer):
    """A quantizer without table, parameters and state. The file of a variant says what the lattice is."""

    trained: ClassVar[bool] = False

    def table(self, condition: Int[Array, ""] | int | None = None) -> None:
        """None, since no table is searched."""
        if condition is not None:
            raise ValueError("a quantizer without table has no classes: leave condition out")

    @property
    def foldable(self) -> bool:
        """No: there is nothing to fold."""
        return False

    def folded(self) -> "Quantizer":
        """This quantizer."""
        return self

    def refuse_levels(self, upto: int | None) -> None:
        """Raises ValueError for an `upto` of `decode`."""
        if upto is not None:
            raise ValueError("a quantizer without table has a single level: leave upto out")


class BinaryQuantizer(LatticeQuantizer):
    """Every channel of a latent becomes one bit of its code: 1 if it is above 0, and 0 if it is 0 or below.

    A variant says by `bit_values` what each bit counts in the code, and by `length` how large its channel becomes.
    """

    bits: int = setting(18, "Bits of a code; latents have as many channels.", above=0, stays=True)
    entropy_weight: float = setting(
        0.1, "Weight of the entropy loss: sure codes, evenly used; 0 leaves it out, at no cost."
    )

    @property
    def size(self) -> int:
        """2^bits."""
        return 2**self.bits

    @property
    def latent_dim(self) -> int:
        """One channel per bit."""
        return self.bits

    @property
    def bit_values(self) -> Int[np.ndarray, "bits"]:
        """What the bit of each channel counts in a code, int32: powers of 2."""
        raise NotImplementedError

    @property
    def length(self) -> float:
        """The absolute value of every channel of the vectors."""
        raise NotImplementedError

    def check(self, axis: int = 1) -> None:
        """There must not be too many codes; any axis fits."""
        most = MOST_CODES.bit_length() - 1
        if not 1 <= self.bits <= most:
            raise ValueError(f"bits {self.bits} must be between 1 and {most}, since the use of each code is counted")

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The sum of the values of all bits that are 1."""
        return jnp.sum(jnp.where(latent > 0, channels(self.bit_values), 0), axis=-1, dtype=jnp.int32)

    def decode(self, codes: Int[Array, "b h w"], upto: int | None = None) -> Float[Array, "b h w d"]:
        """`length` where a bit is 1, else -`length`. ValueError for an `upto`: there are no levels."""
        self.refuse_levels(upto)
        one = (codes[..., None] & channels(self.bit_values)) > 0
        return jnp.where(one, jnp.float32(self.length), jnp.float32(-self.length))

    def architecture(self) -> dict[str, Any]:
        """The number of bits."""
        return {"bits": self.bits}
