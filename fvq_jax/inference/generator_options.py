"""How a generator draws, and what is checked before it does: options, labels, codes, and its tokenizer."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from fvq_jax.inference.arguments import host_array
from fvq_jax.inference.saved_generator import Provenance, SavedGenerator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.gpt import GPT
from fvq_jax.ops.sampling import SCHEDULES, guidance_scales
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
        not tokenizer.net.quantizer.level_names,
        f"tokenizer and generator do not belong together: {tokenizer} has levels or scales, and a generator makes "
        "codes [h, w]: use a tokenizer whose quantizer has none",
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


def knows_no_class(net: GPT) -> bool:
    """Whether the network has seen pictures without their class, which guidance needs."""
    return net.class_dropout > 0


def guidance_of(net: GPT, sampling: Sampling) -> Float[np.ndarray, "t"]:
    """The scale of guidance at every position. InputError for options that cannot be, or not with this network."""
    sampling.check()
    scales = guidance_scales(
        float(sampling.guidance),
        net.length,
        sampling.schedule,
        interval=int(sampling.interval),
        power=float(sampling.power),
    )
    if scales.max() > 1 and not knows_no_class(net):
        raise InputError(
            f"guidance={sampling.guidance:g} needs a model that knows pictures without a class, and this one was "
            "trained without class dropout: use guidance=1"
        )
    return scales


def checked_labels(net: GPT, labels: ArrayLike) -> Int[np.ndarray, "b"]:
    """Labels as an int32 array. InputError unless they are whole numbers, from 0 to the class for "no class"."""
    array = host_array(labels, "labels")
    array = array.astype(np.int32) if array.size == 0 else array
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"labels must be whole numbers [b], not {array.dtype} {list(array.shape)}")
    last = net.classes - (not knows_no_class(net))
    if array.size and not 0 <= array.min() <= array.max() <= last:
        none = f" ({last}: no class)" if knows_no_class(net) else ""
        raise InputError(f"labels must be in 0..{last}{none}, and these are from {array.min()} to {array.max()}")
    return array.astype(np.int32)


def checked_codes(net: GPT, codes: ArrayLike, rows: int) -> Int[np.ndarray, "b t"]:
    """The codes of `rows` images as an int32 array [b, t]. InputError for another shape, type or range."""
    array = host_array(codes, "codes")
    fitting = ((rows, net.length), (rows, *net.grid))
    if array.shape not in fitting or not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(
            f"codes must be whole numbers {list(fitting[0])} or {list(fitting[1])}, as many rows as labels, not "
            f"{array.dtype} {list(array.shape)}"
        )
    if array.size and not 0 <= array.min() <= array.max() < net.vocab:
        raise InputError(f"codes must be in 0..{net.vocab - 1}, and these are from {array.min()} to {array.max()}")
    return array.reshape(rows, net.length).astype(np.int32)


def checked_condition(known: Provenance, tables: int | None, condition: str | None) -> str:
    """The condition that codes are decoded with. InputError if it does not fit, or there is no tokenizer.

    Args:
      known: what the generator was trained on.
      tables: for how many classes the tokenizer has tables; 0: a single table for all; None: there is no tokenizer.
      condition: what is asked for; None: what is known.
    """
    if tables is None:
        raise InputError(
            "there is no tokenizer to make pictures with: load the generator with tokenizer=..., or draw codes "
            "alone with sample_codes"
        )
    if tables == 0:
        require(
            condition in (None, "none"),
            f"condition={condition!r} is for a tokenizer with a table per class, and this one has a single table: "
            "leave it out",
        )
        return "none"
    chosen = known.condition if condition is None else condition
    require(
        chosen in ("label", "null"),
        "this tokenizer has a table per class, and nothing says which one the generator's codes were extracted "
        f'with: give condition="label" or condition="null", not {chosen!r}',
    )
    require(
        known.condition in ("", chosen),
        f"condition={chosen!r} does not fit: the codes that the generator was trained on were extracted with "
        f"condition={known.condition!r}",
    )
    return chosen
