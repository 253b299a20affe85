"""What a setting is: default, type, range, meaning, and whether it may change when a run is resumed.

A setting is defined in one place: the table, or the dataclass (see `setting`), of the module that reads it. This module
does not know which settings there are.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fvq_jax.runtime.errors import InputError

TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "numbers such as (1, 2)"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
      default: its value unless another is given, which must have the same type (or int for float, list for tuple).
      text: what it means, with its unit, in a sentence or two for people.
      above, least, below, most: the range of a number; `least` and `most` belong to the range, `above` and `below` not.
      choices: the only values allowed; () allows any.
      stays: whether a run that is resumed must keep the value that it began with.
    """

    default: Any
    text: str
    above: float | int | None = None
    least: float | int | None = 0
    below: float | int | None = None
    most: float | int | None = None
    choices: tuple[Any, ...] = ()
    stays: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises InputError unless the setting may have this value; the message calls the setting `name`."""
        want = type(self.default)
        kinds: tuple[type, ...] = {float: (int, float), tuple: (tuple, list)}.get(want, (want,))
        # In Python a bool is also an int; here it is not.
        if not isinstance(value, kinds) or isinstance(value, bool) != (want is bool):
            raise InputError(f"config field {name} must be {TYPES[want]}, not {value!r}")
        if self.choices and value not in self.choices:
            names = ", ".join(str(choice) or "nothing" for choice in self.choices)
            raise InputError(f"config field {name} must be one of {names}, not {value!r}")
        if isinstance(value, int | float) and want is not bool:
            self._check_range(name, value)

    def _check_range(self, name: str, value: float | int) -> None:
        low = value > self.above if self.above is not None else self.least is None or value >= self.least
        if not (low and math.isfinite(value)):
            above = None if self.above is None else f"above {self.above:g} and "
            least = "" if self.least is None else f"{self.least:g} or more and "
            raise InputError(f"config field {name} must be {least if above is None else above}finite, not {value}")
        if self.below is not None and value >= self.below:
            raise InputError(f"config field {name} must be below {self.below:g}, not {value}")
        if self.most is not None and value > self.most:
            raise InputError(f"config field {name} must be at most {self.most}, not {value}")


def setting(default: Any, text: str, **rest: Any) -> Any:
    """A dataclass field that is a setting; the arguments are those of `Field`."""
    return dataclasses.field(default=default, metadata={"setting": Field(default, text, **rest)})


def settings_of(kind: type) -> dict[str, Field]:
    """The settings of a dataclass by name, in order; other fields of it are left out."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(kind) if "setting" in field.metadata}


def prefixed(prefix: str, fields: Mapping[str, Field]) -> dict[str, Field]:
    """Puts settings into a section: "optim" and {"hold": ...} give {"optim.hold": ...}."""
    return {f"{prefix}.{name}": field for name, field in fields.items()}
