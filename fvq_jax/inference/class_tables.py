"""The folded tables of a tokenizer whose bridge has classes: made a class at a time, and the last ones kept.

A table is [k, d] float32, so those of all classes together would take gigabytes (1,000 classes x 16,384 codes x 256:
17 GB). `Tokenizer` uses this; `models.quantizers.bridge` says what the classes are.
"""

import collections
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from fvq_jax.inference.arguments import host_array
from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.runtime.errors import InputError

NULL = "null"  # names the table of no class
KEPT_BYTES = 2**28  # of tables that stay on each device; one stays always


def condition_of(classes: int, option: str | None) -> str:
    """What the option `--condition` of a program says of pictures with labels: "label", "null" or "none".

    Args:
      classes: of the tokenizer; 0 for one with a single table, whose condition is "none".
      option: "label", each picture with the table of its own class, or "null"; None if it was not given.

    Raises:
      InputError: it is missing, or not needed.
    """
    if classes and option is None:
        raise InputError(
            "this tokenizer has a bridge with classes: give --condition=label (each picture with its own) or "
            "--condition=null (all with that of no class), and the same where the codes are decoded"
        )
    if not classes and option is not None:
        raise InputError(f"--condition={option} is for a tokenizer whose bridge has classes: leave it out")
    return option or "none"


def labels_for(condition: str, labels: Int[np.ndarray, "b"]) -> Int[np.ndarray, "b"] | str | None:
    """What `Tokenizer.encode` and `decode` take under this condition for pictures with these labels."""
    return {"none": None, "label": labels, "null": NULL}[condition]


class ClassTables:
    """The table of each class of a quantizer, on the devices.

    Attributes:
      classes: how many there are. The table of no class counts as that of the class `classes`.
    """

    def __init__(self, quantizer: Quantizer, params: dict[str, Any], layout: NamedSharding):
        """`params` are those of the quantizer alone, with the bridge; `layout` is where they and the tables lie."""
        self.classes = quantizer.classes
        self._params = jax.device_put(params, layout)
        self._fold = jax.jit(functools.partial(_fold, quantizer), out_shardings=layout)
        self._most = max(1, KEPT_BYTES // (4 * quantizer.size * quantizer.latent_dim))
        self._kept: collections.OrderedDict[int, Array] = collections.OrderedDict()

    def of(self, number: int) -> Float[Array, "k d"]:
        """The table of the class with this number, in 0..classes."""
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            while len(self._kept) >= self._most:  # before the next one is made, so that no more ever lie there
                self._kept.popitem(last=False)
            self._kept[number] = self._fold(self._params, np.int32(number))
        return self._kept[number]

    def numbers(self, labels: ArrayLike | str | None, rows: int) -> Int[np.ndarray, "b"]:
        """The class of each of so many rows, from labels [rows] or "null". InputError for anything else."""
        if labels is None:
            raise InputError(
                f"this tokenizer has a table for each of {self.classes} classes: give labels, one for every row in "
                f'0..{self.classes - 1}, or "{NULL}" for no class'
            )
        if isinstance(labels, str):
            return np.full(rows, self.number(labels), np.int32)
        array = host_array(labels, "labels")
        if array.shape != (rows,) or (rows and not np.issubdtype(array.dtype, np.integer)):
            raise InputError(
                f'labels must be whole numbers [{rows}], one for every row, or "{NULL}", not '
                f"{array.dtype} {list(array.shape)}"
            )
        if rows and not 0 <= array.min() <= array.max() < self.classes:
            raise InputError(
                f"labels must be in 0..{self.classes - 1}, and these are from {array.min()} to {array.max()} "
                f'("{NULL}" stands for no class)'
            )
        return array.astype(np.int32)

    def number(self, condition: int | np.integer | str | None) -> int:
        """The number of the class that a label or "null" names. InputError for anything else."""
        if condition == NULL:
            return self.classes
        if (
            isinstance(condition, int | np.integer)
            and not isinstance(condition, bool)
            and 0 <= condition < self.classes
        ):
            return int(condition)
        raise InputError(
            f"this tokenizer has a table for each of {self.classes} classes: name one by a label in "
            f'0..{self.classes - 1}, or "{NULL}" for no class, not {condition!r}'
        )

    def by_class(self, numbers: Int[np.ndarray, "b"]) -> Iterator[tuple[Bool[np.ndarray, "b"], Float[Array, "k d"]]]:
        """For each class that occurs, which rows belong to it, and its table; those that are kept come first."""
        for number in sorted(np.unique(numbers), key=lambda number: number not in self._kept):
            yield numbers == number, self.of(int(number))


def _fold(quantizer: Quantizer, params: dict[str, Any], number: Int[Array, ""]) -> Any:
    return quantizer.apply({"params": params}, number, method="table")
