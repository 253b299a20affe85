"""Which fields of a config will have no effect: switched off by another field, or later than the last step.

What a field needs, and what it counts in steps, stands in its table (`Field.needs`, `Field.late`).
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import Field, Needs
from fvq_jax.runtime.names import dotted


def refuse_misleading(config: ConfigDict, fields: Mapping[str, Field]) -> None:
    """Raises InputError for a field without effect whose author would be misled about what is trained."""
    for _, line in _idle(config, fields, misleading=True):
        raise InputError(line)


def without_effect(config: ConfigDict, fields: Mapping[str, Field]) -> list[str]:
    """A line for every other field that has no effect."""
    return [line for _, line in _idle(config, fields, misleading=False)]


def too_late(config: ConfigDict, fields: Mapping[str, Field], total_steps: int) -> list[str]:
    """A line for every field with a number of steps that a run of this length does not reach, and what that means."""
    values = dotted(config)
    idle = {name for name, need in ((name, _unmet(field, values)) for name, field in fields.items()) if need}
    return [
        f"{name}={values[name]} is more than the {total_steps} steps of this run: {field.late}"
        for name, field in fields.items()
        if field.late and name not in idle and values[name] > total_steps
    ]


def _idle(config: ConfigDict, fields: Mapping[str, Field], *, misleading: bool) -> list[tuple[str, str]]:
    """Fields that were changed and have no effect, each with its line. One that is off (0, empty) misleads nobody."""
    values, found = dotted(config), []
    for name, field in fields.items():
        value = values[name]
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        changed = (list(value) if isinstance(value, tuple) else value) != default
        need = _unmet(field, values)
        if value and changed and need is not None and need.misleading == misleading:
            found.append((name, _line(name, need, values)))
    return found


def _unmet(field: Field, values: Mapping[str, Any]) -> Needs | None:
    return next((need for need in field.needs if not need.met(values)), None)


def _line(name: str, need: Needs, values: Mapping[str, Any]) -> str:
    there = " and ".join(
        f"{other}={values[other] if values[other] != '' else 'nothing'}" for other in need.given(values)
    )
    return f"{name} is set, but {there} {'do' if len(need.names) > 1 else 'does'} not use it{need.remedy()}"
