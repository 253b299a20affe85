"""The points of a sweep: names, configs and commands, and the record that each has in its workdir.

A point is a config with a few fields replaced, or made with a further argument. `runner` decides which points are run,
and how; `table` and `page` make a report of the records.
"""

import dataclasses
import fcntl
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from fvq_jax.config.checks import all_fields, validate
from fvq_jax.runtime.config_file import explained, run_file
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole
from fvq_jax.runtime.names import dotted
from fvq_jax.tasks import task_of

ARGUMENT = "argument"  # in a point, not a field: what the config is made with beside the argument of the sweep
RECORD, LOG, OUTPUT, LOCK = "point.json", "log.txt", "output.txt", ".lock"  # in the workdir of a point
PROGRAM = (sys.executable, "-m", "fvq_jax.main")
LONGEST_NAME = 100  # characters; file systems take 255 bytes

Status = Literal["waiting", "running", "finished", "failed", "refused", "interrupted", "elsewhere"]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      index: its place in the sweep, from 0.
      overrides: the replaced fields, by full name; and the further `argument`, if there is one.
      config: all fields, by full name, as JSON keeps them.
      workdir: the workdir of its run; the last part is the point's name.
      devices: how many its mesh needs at least; exactly that many if neither axis is -1.
      refused: why its config cannot run; empty if it can.
      defaults: of all fields, as `config` keeps them: an older record lacks the fields that came later.
    """

    index: int
    overrides: dict[str, Any]
    config: dict[str, Any]
    workdir: Path
    devices: int
    refused: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its overrides as the name of a folder."""
        return self.workdir.name


@dataclasses.dataclass(frozen=True)
class Record:
    """What `point.json` says about a point; `summary` is the result line of its run, {} until it is finished."""

    index: int
    name: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    devices: int
    status: Status
    exit_code: int | None = None
    error: str = ""
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_sweep(config_file: str) -> list[dict[str, Any]]:
    """What `sweep` of a config file yields; "FILE:ARG" hands ARG to it, as to `get_config`, if it takes one.

    InputError if there is no `sweep`, or nothing in it.
    """
    path, _, arg = config_file.partition(":")
    sweep = run_file(path).get("sweep")
    if sweep is None:
        raise InputError(f"{path} has no sweep(): a generator of overrides, see docs/sweeps.md")
    with explained(path):
        overrides = list(sweep(arg) if inspect.signature(sweep).parameters else sweep())
    if not overrides:
        raise InputError(f"sweep() of {path} yields no point")
    return overrides


def make_points(
    config: ConfigDict,
    sweep: Sequence[Mapping[str, Any]],
    workdir: Path,
    given: Mapping[str, Any] | None = None,
    with_argument: Callable[[str], ConfigDict] | None = None,
) -> list[Point]:
    """The points of a sweep over `config`, each validated for the devices that its mesh needs.

    InputError for a field that is swept and given too, for a field that no config has or a value of another type, and
    for two points of one name. A point that cannot run for another reason is kept, with the reason in `refused`.

    Args:
      given: the fields that were overridden on the command line.
      with_argument: makes the config of a point that has a further argument.
    """
    points: dict[str, Point] = {}
    for index, overrides in enumerate(sweep):
        clash = sorted(overrides.keys() & (given or {}).keys())
        if clash:
            raise InputError(f"--config.{clash[0]} is what this sweep varies: leave it out, or run fvq_jax.main")
        name = point_name(overrides)
        if name in points:
            raise InputError(f"points {points[name].index} and {index} of the sweep are both called {name}")
        try:
            made = with_argument(overrides[ARGUMENT]) if with_argument and ARGUMENT in overrides else config
            changed = made.copy_and_resolve_references()
            changed.update_from_flattened_dict(_fields(overrides))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            reason = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise InputError(f"point {index} of the sweep, {name}: {reason}") from None
        devices, refused, defaults = devices_needed(changed), "", {}
        try:
            validate(changed, task_of(changed), devices)
            defaults = {name: field.default for name, field in all_fields(task_of(changed), changed).items()}
        except InputError as error:
            refused = str(error)
        kept = json.loads(
            json.dumps({"overrides": dict(overrides), "config": dotted(changed), "defaults": dotted(defaults)})
        )
        made_of = kept["overrides"], kept["config"]
        points[name] = Point(index, *made_of, workdir / name, devices, refused, kept["defaults"])
    return list(points.values())


def joined_argument(config_file: str, argument: str) -> str:
    """FILE or FILE:ARG with a further argument. InputError if both give the same name: a sweep varies it."""
    own = {_name(item) for item in config_file.partition(":")[2].split(",")}
    for name in filter(None, map(_name, argument.split(","))):
        if name in own:
            raise InputError(f"the argument {name} of {config_file} is what this sweep varies: leave it out")
    return config_file + ("," if ":" in config_file else ":") + argument if argument else config_file


def _name(item: str) -> str:
    """The name in NAME=VALUE, or in NAME alone."""
    return item.partition("=")[0]


def _fields(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if name != ARGUMENT}


def point_name(overrides: Mapping[str, Any]) -> str:
    """The overrides as the name of a folder: tokenizer.quantizer.bridge=L-4,optim.decay=cosine.

    Characters that a file system or a shell might not take become hyphens. A long name is cut, and ends in a hash of
    the overrides.
    """
    parts = [f"{field}={re.sub(r'[^A-Za-z0-9.+]+', '-', value_text(value))}" for field, value in overrides.items()]
    name = ",".join(parts) or "base"
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(overrides, default=list).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def value_text(value: Any) -> str:
    """A value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def devices_needed(config: ConfigDict) -> int:
    """How many devices the mesh needs at least: the product of the sizes that are given."""
    return max(config.mesh.data, 1) * max(config.mesh.codebook, 1)


def command(point: Point, config_file: str, given: Mapping[str, Any]) -> list[str]:
    """What runs the point: fvq_jax.main with the sweep's own overrides, then the point's."""
    fields = {**given, **_fields(point.overrides)}
    overrides = [f"--config.{field}={value_text(value)}" for field, value in fields.items()]
    config_file = joined_argument(config_file, point.overrides.get(ARGUMENT, ""))
    return [*PROGRAM, f"--config={config_file}", f"--workdir={point.workdir}", *overrides]


def write_record(point: Point, status: Status, **outcome: Any) -> None:
    """Replaces the point's record, atomically."""
    record = Record(point.index, point.name, point.overrides, point.config, point.devices, status, **outcome)
    with replace_whole(point.workdir / RECORD) as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def read_record(workdir: Path) -> Record | None:
    """The record in a point's workdir; None without one. InputError if the file is something else."""
    path = workdir / RECORD
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not the record of a point: {error}") from None


def is_finished(point: Point) -> bool:
    """Whether a run of this config has reached its last step; on how many devices does not matter."""
    record = read_record(point.workdir)
    if record is None or record.status != "finished":
        return False
    recorded = {**point.defaults, **record.config}  # a field that came later had its default before
    return _without_devices(recorded) == _without_devices(point.config)


def _without_devices(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "mesh.cpu_devices"}


def try_lock(workdir: Path) -> int | None:
    """Locks a point's workdir and returns the lock as a file descriptor; None if another program holds it.

    The lock is gone when every process that has the descriptor has closed it or died. Handed to a run, it lasts as long
    as the run, even if the sweep is killed.
    """
    file = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
