"""Shows a config to people: every field with its value, what it means, and its default where that differs."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.names import dotted


def explain(config: ConfigDict, fields: Mapping[str, Field]) -> str:
    """One line per field, grouped by section: full name, value, text, and the default if it differs."""
    values = dotted(config)
    shown = {name: _value(values.get(name)) for name in fields}
    defaults = {
        name: _value(list(f.default) if isinstance(f.default, tuple) else f.default) for name, f in fields.items()
    }
    # The sort is stable, so that the fields of a section stay in the order in which they are declared.
    order = sorted(fields, key=lambda name: (("." in name), name.rpartition(".")[0]))
    width = max(len(f"{name} = {shown[name]}") for name in fields)
    lines = []
    for name in order:
        field = fields[name]
        default = "" if shown[name] == defaults[name] else f" (default: {defaults[name]})"
        choices = f" One of {', '.join(str(c) or 'nothing' for c in field.choices)}." if field.choices else ""
        fixed = " Must not change when a run is resumed." if field.stays else ""
        needs = "".join(f" Only with {need.text()}." for need in field.needs)
        lines.append(f"{f'{name} = {shown[name]}':{width}}  {field.text}{choices}{needs}{fixed}{default}")
    return "\n".join(lines)


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else repr(value) if value == "" else str(value)
