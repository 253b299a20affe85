"""What the generator gets from a source of codes: the codes of all crops of a picture with its label, by index."""

import dataclasses
import math
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int

_CENTRE_OF_TEN = 4  # ten crops are: four corners, the centre, and the same of the mirrored picture


class CodeRecord(TypedDict):
    """One picture: `codes` int32 [scales, crops, *grid], and its class index."""

    codes: Int[np.ndarray, "scales crops ..."]
    label: np.int32


@dataclasses.dataclass(frozen=True)
class CodeInfo:
    """What the codes of a source are.

    Attributes:
      tokenizer: fingerprint of the tokenizer that made them (`Tokenizer.fingerprint`); "" if it is not known.
      vocab: how many codes there are: all are below it; 0 if it is not known.
      grid: the shape of the codes of one crop, for instance (16, 16); they are flattened row by row.
      classes: how many classes there are: all labels are below it; 0 if it is not known.
      class_names: their names; () if they are not known.
      scales: for every scale, the shorter side of the picture before cropping, in units of `size`. None in it means
        that the picture was cropped as it is.
      crops: how many crops there are of every picture and scale.
      cropping: "center", "ten" (crops of the corners and the centre, then the same of the mirrored picture) or
        "random".
      condition: what a class-conditional bridge was given: "none" if there is none, "label", or "null"; "" if it is not
        known.
      size: side of the crops, in pixels; 0 if it is not known.
    """

    tokenizer: str
    vocab: int
    grid: tuple[int, ...]
    classes: int
    class_names: tuple[str, ...]
    scales: tuple[float | None, ...]
    crops: int
    cropping: str
    condition: str
    size: int

    @property
    def length(self) -> int:
        """How many codes one crop has, t."""
        return math.prod(self.grid)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes of a record: [scales, crops, *grid]."""
        return (len(self.scales), self.crops, *self.grid)

    @property
    def first_crop(self) -> int:
        """The crop that stands for a picture in an evaluation: the one of the centre if there is one, or the first."""
        return _CENTRE_OF_TEN if self.cropping == "ten" else 0


@runtime_checkable
class CodeSource(Protocol):
    """Codes of pictures, by index. It is sent to worker processes, so it must be small when pickled."""

    @property
    def info(self) -> CodeInfo:
        """What the codes are."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CodeRecord:
        """Record `index`. InputError, which names the file, if it is damaged."""
        ...

    def name(self, index: int) -> str:
        """What to call record `index`: where it is kept, and the picture it was made from if that is known."""
        ...

    def fingerprint(self) -> str:
        """Changes with the codes, not with where they lie: a resumed run must see the same ones."""
        ...
