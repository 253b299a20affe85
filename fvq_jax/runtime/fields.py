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
class Needs:
    """What another setting must be, so that a setting has any effect.

    Attributes:
      names: the other setting; of several, one is enough. In the table of a section a name without a dot belongs to it.
      values: what it may be; () allows any value.
      but: what it may not be; by default nothing that is off: 0, empty text, False.
      misleading: whether the setting would mislead about what is trained, so that it is refused and not only named.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...] = ()
    but: tuple[Any, ...] = (0, "")  # False equals 0
    misleading: bool = False

    def given(self, values: Mapping[str, Any]) -> list[str]:
        """Those of the names that there are. A table that several tasks share may name what only one of them has."""
        return [name for name in self.names if name in values]

    def met(self, values: Mapping[str, Any]) -> bool:
        """Whether that is so, with these values of all settings by full name."""
        found = [values[name] for name in self.given(values)]
        return any((not self.values or value in self.values) and value not in self.but for value in found)

    def remedy(self) -> str:
        """What to set, as the end of a message; empty if there is no single way."""
        if not self.values:
            return f": set {self.names[0]} too" if self.misleading else ""
        return f": add --config.{self.names[0]}={' or '.join(map(str, self.values))}"

    def text(self) -> str:
        """The condition for people."""
        names = " or ".join(self.names)
        if self.values:
            return f"{names}={' or '.join(map(str, self.values))}"
        return f"{names} other than {', '.join(str(value) or 'nothing' for value in self.but)}"


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
      default: its value unless another is given, which must have the same type (or int for float, list for tuple).
      text: what it means, with its unit, in a sentence or two for people.
      above, least, below, most: the range of a number; `least` and `most` belong to the range, `above` and `below` not.
      choices: the only values allowed; () allows any.
      stays: whether a run that is resumed must keep the value that it began with.
      needs: what must be so that the setting has any effect, all of these.
      late: of a number of steps: what it means that the run ends before.
    """

    default: Any
    text: str
    above: float | int | None = None
    least: float | int | None = 0
    below: float | int | None = None
    most: float | int | None = None
    choices: tuple[Any, ...] = ()
    stays: bool = False
    needs: tuple[Needs, ...] = ()
    late: str = ""

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

    def inside(need: Needs) -> Needs:
        return dataclasses.replace(
            need, names=tuple(name if "." in name else f"{prefix}.{name}" for name in need.names)
        )

    return {
        f"{prefix}.{name}": dataclasses.replace(field, needs=tuple(map(inside, field.needs)))
        for name, field in fields.items()
    }
