"""Every task by its name in a config (`task`). A command looks the task up here and hands it to `training`."""

from ml_collections import ConfigDict

from fvq_jax.config.checks import all_fields
from fvq_jax.config.fields import make_config
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks.generator.task import GeneratorTask
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.task import Task

TASKS: dict[str, type[Task]] = {"tokenizer": TokenizerTask, "generator": GeneratorTask}


def task_of(config: ConfigDict) -> type[Task]:
    """The task that a config names. InputError, which lists the known names, if there is no such task."""
    name = config.get("task")
    if name not in TASKS:
        raise InputError(f"config field task must be one of {', '.join(TASKS)}, not {name!r}")
    return TASKS[name]


def default_config(task: str = "tokenizer") -> ConfigDict:
    """The config of a task with the default of every field; locked, so that a misspelt field raises."""
    config = make_config(all_fields(TASKS[task]))
    config.task = task
    return config
