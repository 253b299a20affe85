"""How a generator draws, and what is checked before it does: options, numbers of images, and its tokenizer."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from fvq_jax.inference.saved_generator import SavedGenerator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.ops.sampling import SCHEDULES
from fvq_jax.runtime.errors import InputError, require

_LARGEST = 2**32  # seeds and numbers of images are below it


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How codes are drawn; see `ops.sampling` for the formulas.

    Attributes:
      guidance: the scale of classifier-free guidance; up to 1, the classes alone decide and half the work is saved.
      temperature: what the logits are divided by; 0 takes the likeliest code each time.
      top_k: draw from so many of the likeliest codes; 0: from all.
      top_p: draw from the likeliest codes that together have this probability; 1: from all.
      schedule: of the guidance over the codes of an image: constant, cosine or linear.
      interval: guide only the codes 0 to interval + 1; -1: all.
      power: of the cosine schedule.
    """

    guidance: float | int = 1.75
    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    schedule: str = "constant"
    interval: int = -1
    power: float | int = 1.0

    def check(self) -> None:
        """Raises InputError if a value cannot be."""
        for name, value, least in (("guidance", self.guidance, 0), ("temperature", self.temperature, 0)):
            require(math.isfinite(value) and value >= least, f"{name} must be {least} or more, not {value}")
        require(self.top_k >= 0, f"top_k must be a whole number, 0 (all codes) or more, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1 (all codes), not {self.top_p}")
        require(self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        require(self.interval >= -1, f"interval must be -1 (all codes are guided) or more, not {self.interval}")
        require(math.isfinite(self.power) and self.power > 0, f"power must be above 0, not {self.power}")


def check_tokenizer(saved: SavedGenerator, tokenizer: Tokenizer) -> None:
    """Raises InputError, naming both, unless the generator's codes can be those of the tokenizer."""
    net, known = saved.net, saved.provenance
    size, found = tokenizer.net.quantizer.size, tokenizer.fingerprint
    require(
        size == net.vocab,
        f"tokenizer and generator do not belong together: {tokenizer} has {size} codes, and the generator {net.vocab}",
    )
    require(
        known.tokenizer in ("", found),
        f"tokenizer and generator do not belong together: the generator was trained on codes of the tokenizer "
        f"{known.tokenizer}, and this one is {found}",
    )
    sides = tuple(side * tokenizer.downsampling for side in net.grid)
    require(
        known.image_size == 0 or sides == (known.image_size,) * 2,
        f"tokenizer and generator do not belong together: a grid of {net.grid[0]} x {net.grid[1]} codes is "
        f"{sides[0]} x {sides[1]} pixels of this tokenizer, and the generator was trained on {known.image_size} x "
        f"{known.image_size}",
    )
    with_classes = known.condition in ("label", "null")
    require(
        not known.condition or with_classes == (tokenizer.classes > 0),
        f"tokenizer and generator do not belong together: the codes were extracted with condition="
        f"{known.condition!r}, and the tokenizer has "
        + (f"a table for each of {tokenizer.classes} classes" if tokenizer.classes else "a single table"),
    )
    require(
        tokenizer.classes in (0, net.classes),
        f"tokenizer and generator do not belong together: the tokenizer has {tokenizer.classes} classes, and the "
        f"generator {net.classes}",
    )


def check_numbers(seed: int | np.integer, numbers: np.ndarray, rows: int) -> None:
    """Raises InputError unless the seed and a number for each image are whole numbers below 2^32."""
    require(0 <= int(seed) < _LARGEST, f"seed must be in 0..{_LARGEST - 1}, not {seed}")
    if numbers.shape != (rows,) or not (rows == 0 or jnp.issubdtype(numbers.dtype, jnp.integer)):
        raise InputError(f"numbers must be whole numbers [{rows}], not {numbers.dtype} {list(numbers.shape)}")
    if rows and not 0 <= numbers.min() <= numbers.max() < _LARGEST:
        raise InputError(f"numbers of images must be in 0..{_LARGEST - 1}, not {numbers.min()} to {numbers.max()}")
