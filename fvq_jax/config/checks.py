"""Refuses a config that is misspelt or cannot run, in one line that says what would work, before anything compiles.

Only what holds for every task is checked here; the task checks the rest (`Task.check`).
"""

from typing import Protocol, runtime_checkable

from ml_collections import ConfigDict

from fvq_jax.config.effects import refuse_misleading
from fvq_jax.config.fields import SHARED
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.mesh import mesh_shape
from fvq_jax.runtime.names import did_you_mean, dotted


@runtime_checkable
class Checked(Protocol):
    """What this module needs of the class of a task, see `training.task.Task`."""

    @classmethod
    def fields(cls, config: ConfigDict | None = None) -> dict[str, Field]:
        """The task's fields beyond the shared ones."""
        ...

    @classmethod
    def check(cls, config: ConfigDict, devices: int) -> None:
        """The task's own checks; raises InputError."""
        ...


def all_fields(task: type[Checked], config: ConfigDict | None = None) -> dict[str, Field]:
    """Every field, by its full name, that `config` (without it: the default config) must have for this task."""
    return {**SHARED, **task.fields(config)}


def validate(config: ConfigDict, task: type[Checked], devices: int) -> None:
    """Refuses, with one `InputError`, a configuration that is misspelt or cannot run on that many devices."""
    fields, given = all_fields(task, config), dotted(config)
    for name in sorted(given.keys() - fields.keys()):
        raise InputError(f"unknown config field {name}{did_you_mean(name, fields)} (--explain lists all fields)")
    for name in sorted(fields.keys() - given.keys()):
        raise InputError(f"config field {name} is missing: start from fvq_jax.tasks.default_config()")
    for name, field in fields.items():
        field.check(name, given[name])
    refuse_misleading(config, fields)
    _check_schedule(config)
    task.check(config, devices)  # before the mesh: the task knows which sizes of the codebook axis work at all
    mesh_shape(config.mesh.data, config.mesh.codebook, devices)
    _check_batch(config, devices)


def near(value: int, unit: int) -> str:
    """The multiples of `unit` below and above `value`, as the text of a message that says what would work."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)


def _check_schedule(config: ConfigDict) -> None:
    flat = dotted(config)
    for name in ("", "optim.warmup_"):
        steps, epochs = flat[f"{name}steps"], flat[f"{name}epochs"]
        require(not (steps and epochs), f"{name}steps is {steps} and {name}epochs is {epochs}: set one of them to 0")
    require(bool(config.steps or config.epochs), "the run has no length: set steps or epochs")
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every
    require(
        keep % every == 0,
        f"checkpoint.keep_every {keep} is not a multiple of checkpoint.every_steps {every}: use {near(keep, every)}",
    )


def _check_batch(config: ConfigDict, devices: int) -> None:
    micro = config.optim.accumulate
    unit, size = devices * micro, config.batch_size
    parts = f"{devices} devices" + (f" x {micro} micro-batches (optim.accumulate)" if micro > 1 else "")
    require(size >= unit, f"batch_size {size} is below {parts}: the smallest that works is {unit}")
    require(size % unit == 0, f"batch_size {size} is not divisible by {parts}: use {near(size, unit)}")
    size, nearest = config.eval.batch_size, near(config.eval.batch_size, devices)
    require(size % devices == 0, f"eval.batch_size {size} is not divisible by {devices} devices: use {nearest}")
