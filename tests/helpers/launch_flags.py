"""Command lines that are shown to people, checked as the program would."""

from configs import fvq262k
from fvq_jax.config.checks import validate
from fvq_jax.runtime.names import dotted
from fvq_jax.tasks import task_of


def check_flags(flags, devices):
    """Applies the flags of a command line to the config they name, and checks it; returns the config."""
    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert {"config", "workdir"} < values.keys()
    path, _, argument = values["config"].partition(":")
    assert path == "configs/fvq262k.py"
    config = fvq262k.get_config(argument)
    for name in values:
        if name.startswith("config."):
            field = name.removeprefix("config.")
            config.update_from_flattened_dict({field: type(dotted(config)[field])(values[name])})
    validate(config, task_of(config), devices)
    return config
