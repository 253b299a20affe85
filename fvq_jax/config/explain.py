"""A config for people: every field with its value, its default where that differs, and what it means."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.names import dotted


def explain(config: ConfigDict, fields: Mapping[str, Field]) -> str:
    """One line per field, sections together: full name, value, default, text."""
    values = dotted(config)
    shown = {name: _value(values.get(name)) for name in fields}
    defaults = {
        name: _value(list(f.default) if isinstance(f.default, tuple) else f.default) for name, f in fields.items()
    }
    order = sorted(
        fields, key=lambda name: (("." in name), name.rpartition(".")[0])
    )  # stable: as declared in a section
    width = max(len(f"{name} = {shown[name]}") for name in fields)
    lines = []
    for name in order:
        field = fields[name]
        default = "" if shown[name] == defaults[name] else f" (default: {defaults[name]})"
        choices = f" One of {', '.join(str(c) or 'nothing' for c in field.choices)}." if field.choices else ""
        fixed = " Stays as it is when a run goes on." if field.stays else ""
        lines.append(f"{f'{name} = {shown[name]}':{width}}  {field.text}{choices}{fixed}{default}")
    return "\n".join(lines)


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else repr(value) if value == "" else str(value)
