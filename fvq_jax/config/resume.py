"""Checks that a run may be resumed in its workdir: only with the model, data and seed that it began with."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.names import dotted


def check_continues(saved: Mapping[str, Any], config: ConfigDict, fields: Mapping[str, Field]) -> list[str]:
    """Compares a workdir's saved config with the one given now.

    Args:
      saved: the content of `config.json`.
      config: the config given now, already validated.
      fields: the fields of `config`, by full name. Those with `stays` must be equal in both configs. A field that only
        the saved config has is refused like a changed one, since it belonged to another model. One that only `config`
        has came later, and had its default before.

    Returns:
      The differences that are allowed, as text for the log.

    Raises:
      InputError: a field that must stay differs (the message names all of them), or the workdir was begun by an older
        version.
    """
    if "task" not in dotted(saved):
        raise InputError(
            "this workdir was begun by an older version of fvq_jax, whose runs this one reads but does not continue: "
            "finish it with that version, or start another workdir with --config.init_from=THIS_WORKDIR"
        )
    changed = changes(saved, config, fields)
    text = {name: f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items()}
    refused = [text[name] for name in changed if name not in fields or fields[name].stays]
    if refused:
        raise InputError(
            f"this workdir holds a run with another model or data ({'; '.join(refused)}): "
            "use another workdir or the config it was started with"
        )
    return list(text.values())


def changes(saved: Mapping[str, Any], config: ConfigDict, fields: Mapping[str, Field]) -> dict[str, tuple[Any, Any]]:
    """Every field that differs, with its value before and now; the arguments are those of `check_continues`."""
    before, now = with_defaults(saved, fields), dotted(config)
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return {name: (before.get(name), now.get(name)) for name in names}


def with_defaults(saved: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """A saved config by full names, with the default of each field that came later."""
    return dotted({name: field.default for name, field in fields.items()}) | dotted(saved)
