"""One run of the training program: its parts, made from a config, and all checks before it may start.

`loop` does the steps and writes what comes of them.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fvq_jax.config.checks import all_fields, validate
from fvq_jax.config.effects import too_late, without_effect
from fvq_jax.config.resume import changes, check_continues, with_defaults
from fvq_jax.runtime import clock
from fvq_jax.runtime.cpu_devices import divide_cpu
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.files import json_text, replace_whole
from fvq_jax.runtime.heartbeat import HEARTBEATS
from fvq_jax.runtime.logs import LOGS
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import dotted, nest
from fvq_jax.runtime.paths import require_no_pattern
from fvq_jax.runtime.storage import (
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    PROVENANCE,
    REPORT,
    complete_steps,
    require_prompt_listing,
)
from fvq_jax.runtime.workdir_lock import hold
from fvq_jax.training.metric_files import METRICS_FILE, TENSORBOARD, read_metrics
from fvq_jax.training.optim import Annealing
from fvq_jax.training.state import TrainState
from fvq_jax.training.step import TrainStep
from fvq_jax.training.task import Evaluation, Mendable, Task

_FOLDERS = (CHECKPOINTS, LOGS, HEARTBEATS, TENSORBOARD, REPORT)
_FILES = (CONFIG, HISTORY, PROVENANCE, METRICS_FILE)


@dataclasses.dataclass
class Run:
    """Everything that stays the same during one run."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    task: Task
    step: TrainStep
    total_steps: int
    first: bool  # whether this is the first process, which writes the files
    init_params: dict[str, Any] | None  # with which the main network of a new run starts; None: random ones
    before: dict[str, Any] | None  # the config that was in the workdir; None if there was none

    def data_position(self, step: int, unreadable: Collection[str] = ()) -> dict[str, Any]:
        """The position in the data, for a checkpoint: data, seed and step determine the next batch.

        If this run has found unreadable examples, with these names, it also says what the data are without them.
        """
        source = self.task.source("train")
        position = {"next_step": step, "seed": self.config.seed, "pictures": source.fingerprint()}
        if unreadable and isinstance(source, Mendable):
            names = sorted(unreadable)
            position["unreadable"] = {"names": names, "rest": source.fingerprint_without(names)}
        return position

    def summary(self, step: int, evaluation: Evaluation, record: dict[str, Any]) -> dict[str, Any]:
        """The result line that the program prints, by name."""
        main = self.step.abstract().networks[self.task.main]
        metrics, rate = evaluation.metrics, f"{self.task.unit}_per_second"
        return {
            "step": step,
            **{name: metrics[name] for name in self.task.headline if name in metrics},
            **evaluation.facts,
            "parameters": int(parameter_overview.count_parameters(main.params)),
            rate: record[rate],
            "seconds": record["seconds"],
            "workdir": str(self.workdir),
        }

    def report(self, state: TrainState, evaluation: Evaluation) -> None:
        """Writes the report of the task into the workdir. All processes must call it."""
        self.task.report(state, evaluation, self.workdir, read_metrics(self.workdir) if self.first else [])


def divide_cpu_for(config: ConfigDict) -> None:
    """Makes a CPU count as several devices if the config says so; before the first use of a device.

    A field that is missing is left to `validate`.
    """
    flat, ours = dotted(config), ("mesh.cpu_devices", "mesh.data", "mesh.codebook")
    batches = ("batch_size", "optim.accumulate", "eval.batch_size")
    if not flat.keys() >= {*ours, *batches}:
        return
    (wanted, *mesh), (size, micro, scored) = ([flat[name] for name in names] for names in (ours, batches))
    divide_cpu(wanted, (mesh[0], mesh[1]), (size // max(1, micro), scored))


def prepare(
    task_class: type[Task], config: ConfigDict, workdir: str | os.PathLike[str], stack: contextlib.ExitStack
) -> Run:
    """Makes the parts of a run and checks everything that can be wrong, cheap checks first.

    Locks the workdir until `stack` is left. Raises InputError for anything that cannot work.
    """
    validate(config, task_class, jax.device_count())
    mesh = make_mesh(config.mesh.data, config.mesh.codebook)
    if config.batch_size % jax.process_count():
        raise InputError(f"batch_size {config.batch_size} is not divisible by {jax.process_count()} processes")
    workdir = Path(workdir).expanduser().absolute()
    first = jax.process_index() == 0
    before = _check_workdir(workdir, task_class, config)
    if first:
        stack.enter_context(hold(workdir))
        require_prompt_listing(workdir)
    task = task_class(config, mesh)
    total, warmup = _length(dotted(config), len(task.source("train")))
    task.source("eval")
    if warmup >= total:
        raise InputError(
            f"a warm-up of {warmup} steps leaves nothing of the {total} steps of this run: lower "
            "optim.warmup_steps or optim.warmup_epochs"
        )
    task.open_files()
    init_params = None
    if config.init_from and not complete_steps(workdir):
        try:
            init_params = task.load(config.init_from)
        except InputError as error:
            raise InputError(f"init_from: {error}") from error
    if first and not (workdir / CONFIG).exists():  # only now, after all checks
        try:
            if provenance := task.provenance():
                _write_json(workdir / PROVENANCE, provenance)
            _write_json(workdir / CONFIG, json.loads(config.to_json()))
        except OSError as error:
            raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from None
    step = TrainStep.of(task, config, mesh, total, warmup)
    return Run(config, workdir, mesh, task, step, total, first, init_params, before)


def _length(config: Mapping[str, Any], examples: int) -> tuple[int, int]:
    """The steps of a run, and those of its warm-up; `config` by full names."""
    epoch = examples / config["batch_size"]  # in steps, not rounded: a batch may span two epochs
    total = config["steps"] or math.ceil(config["epochs"] * epoch)
    return total, config["optim.warmup_steps"] or round(config["optim.warmup_epochs"] * epoch)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replace_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def _check_workdir(workdir: Path, task_class: type[Task], config: ConfigDict) -> dict[str, Any] | None:
    """Makes the workdir or, if there is one, checks that a run in it may be resumed with this config.

    Returns the config that lies there.
    """
    path, saved = workdir / CONFIG, None
    if ":/" in str(workdir):
        raise InputError(f"workdir {workdir} is not a local path: mount the bucket and give the mounted folder")
    require_no_pattern(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name in (*_FOLDERS, *_FILES):
            there, wanted = workdir / name, name in _FOLDERS
            fits = there.is_dir() if wanted else there.is_file()
            require(
                fits or not os.path.lexists(there),
                f"{there} is no {'folder' if wanted else 'file'}, which it is in the workdir of a run: use another one",
            )
        if path.exists():
            saved = json.loads(path.read_text())
            if not isinstance(saved, dict):
                raise InputError(f"{path} is not a config, but {type(saved).__name__}")
            check_continues(saved, config, all_fields(task_class, config))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path} is not a config: {error}") from None
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used: {error.strerror or error}") from None
    return saved


def check_record(run: Run, record: dict[str, Any], step: int) -> None:
    """Raises InputError unless a checkpoint belongs to this run: same model, and same data in the same order."""
    check_continues(record["config"], run.config, all_fields(type(run.task), run.config))
    before = dict(record["data"])
    unreadable = before.pop("unreadable", None)
    now = run.data_position(step, unreadable["names"] if unreadable else ())
    rest = now.pop("unreadable", None)
    if unreadable and rest == unreadable and before["pictures"] != now["pictures"]:
        before["pictures"] = now["pictures"]
        logging.warning(
            "some of the unreadable %s were removed or repaired; the order of the others follows from how many there "
            "are, so from here on this run may take other batches than it would have taken",
            run.task.unit,
        )
    if before != now:
        raise InputError(
            f"the {run.task.unit} to train on are not those this run began with ({before['pictures']} -> "
            f"{now['pictures']}): bring the same ones back, except what this run has named as unreadable, or start in "
            "another workdir"
        )


def note_start(run: Run, step: int, record: dict[str, Any]) -> None:
    """Notes a start from this step with all fields that changed since the last one: in the log, and in a file.

    The file tells the devices too. `record` is that of the checkpoint, {} without one; its config is compared with if
    that of the workdir was lost.
    """
    fields, before = all_fields(type(run.task), run.config), run.before or record.get("config")
    changed = changes(before, run.config, fields) if before else {}
    for name, (old, new) in changed.items():
        logging.info("changed since the last start: %s: %r -> %r", name, old, new)
    if before and changed:
        _warn_of_rate(run, step, with_defaults(before, fields))
    if not run.first:
        return
    devices = {"devices": run.mesh.size, "device": run.mesh.devices.flat[0].device_kind}
    line = {"step": step, "time": clock.wall(), **devices, "processes": jax.process_count(), "changed": changed}
    with (run.workdir / HISTORY).open("a") as file:
        file.write(json_text(line) + "\n")
    if changed:
        _write_json(run.workdir / CONFIG, json.loads(run.config.to_json()))


def _warn_of_rate(run: Run, step: int, before: Mapping[str, Any]) -> None:
    """Warns if the changed fields move the learning rate; a longer run, for instance, has not finished its decay."""
    total, warmup = _length(before, len(run.task.source("train")))
    schedule = Annealing.of(nest(before, ".")["optim"], total, warmup).rate(before["optim.learning_rate"])
    old, new = float(schedule(step)), float(run.step.rate(step))
    if not math.isclose(old, new, rel_tol=0.01):
        logging.warning(
            "the learning rate goes on at %.3g; with the %d steps and the settings of the last start it would have "
            "been %.3g",
            new,
            total,
            old,
        )


def log_start(run: Run) -> None:
    """Logs devices, sizes of the networks, length of the run, fields without effect, and then the task's own lines."""
    devices = jax.devices()
    logging.info("%d x %s, mesh %s", len(devices), devices[0].device_kind, dict(run.mesh.shape))
    for name, network in run.step.abstract().networks.items():
        logging.info("%s: %s parameters", name, f"{parameter_overview.count_parameters(network.params):,}")
    logging.info("%d steps of %d %s", run.total_steps, run.config.batch_size, run.task.unit)
    fields = all_fields(type(run.task), run.config)
    for line in (*without_effect(run.config, fields), *too_late(run.config, fields, run.total_steps)):
        logging.warning("%s", line)
    run.task.log_start()
