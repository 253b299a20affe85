"""Checkpoints of a run: the whole training state, the position in the data, and the config, through Orbax.

Saving is asynchronous; `latest_step` never sees a checkpoint that was not completed. A complete one holds the checksums
of its files: they are checked before it is read, and a checkpoint whose files have changed on disk is passed over.

A checkpoint is completed by renaming its folder. In a mounted bucket that may mean to copy file after file and to
delete the old ones, so a process that is killed there may leave parts of the folder under both names. Whoever finds
both, and the new one not to be what its checksums say, removes both: that checkpoint was not completed.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import struct

from fvq_jax.runtime.agreement import gather_texts
from fvq_jax.runtime.checksums import FILE as CHECKSUMS
from fvq_jax.runtime.checksums import find_damage, write_checksums
from fvq_jax.runtime.errors import InputError, RunError, StorageError
from fvq_jax.runtime.names import path_name
from fvq_jax.runtime.paths import require_no_pattern
from fvq_jax.runtime.storage import CHECKPOINTS, UNFINISHED_CHECKPOINT, brief, saving_errors
from fvq_jax.training.state import TrainState

DAMAGED = "checkpoints_damaged"  # damaged checkpoints are moved there, so that their steps can be saved again
STAMP = "_CHECKPOINT_METADATA"  # Orbax notes the time in this file when it renames the folder; nothing in it is needed
MERGED = "manifest.ocdbt"  # the index of all arrays, which Orbax makes of what each process wrote
# A replicated array is written in parts, one by each device that holds it, if a part has at least so many bytes.
# Cutting small arrays costs more than it saves: a program is compiled for every part.
SMALLEST_PART = 2**20
# What Orbax raises for files that it cannot read, and for files that do not hold what it was asked for.
_READ_ERRORS = (ValueError, KeyError, TypeError, OSError)

T = TypeVar("T")


class _DamagedError(Exception):
    """A checkpoint is damaged; the message says how, and is the same in all processes."""


@struct.dataclass
class Checkpoint:
    """What was read back: the state, laid out as asked for, and the record saved beside it (plain JSON)."""

    state: TrainState
    record: dict[str, Any] = struct.field(pytree_node=False)


class Checkpoints:
    """The checkpoints of one workdir: the `keep_last` newest, and for good one every `keep_every` steps (0: none).

    With `read_only` nothing in the workdir is changed, since another process may be writing there.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, keep_last: int = 2, keep_every: int = 0, read_only: bool = False
    ):
        self._workdir = Path(workdir).absolute()
        require_no_pattern(self._workdir)
        self._folder = self._workdir / CHECKPOINTS
        self._read_only = read_only
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every or None,
            step_prefix="step",
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            create=not read_only,
            lightweight_initialize=True,  # metadata of a damaged checkpoint may not be readable
        )
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_PART)
        kinds = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=kinds),
            "record": ocp.JsonCheckpointHandler(),
        }
        with self._storage_errors():
            if not read_only:
                if jax.process_index() == 0:
                    self._remove_unfinished()
                _first_text("")  # the other processes wait here until it has been removed
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, StorageError):
            return  # nothing is being written any more
        if kind is not None and jax.process_count() > 1 and not issubclass(kind, InputError | RunError):
            return  # another process may have ended, and closing would wait for it
        with self._storage_errors():
            self._manager.close()

    def _remove_unfinished(self) -> None:
        """Removes what processes that were killed have left of checkpoints that they did not complete."""
        for unfinished in sorted(self._folder.glob(f"*{UNFINISHED_CHECKPOINT}*")):
            final = unfinished.with_name(unfinished.name.partition(UNFINISHED_CHECKPOINT)[0])
            if final.exists() and self._damage(final):
                shutil.rmtree(final)
            shutil.rmtree(unfinished)

    def _damage(self, folder: Path) -> str:
        """What is wrong with the folder of a checkpoint according to its checksums; empty if nothing is.

        A reader takes one without checksums, as earlier versions wrote, unless it is on its way to its name. A run that
        goes on has none of these: it did not begin with such a version.
        """
        if (folder / CHECKSUMS).exists() or (
            self._read_only and not any(folder.parent.glob(f"{folder.name}{UNFINISHED_CHECKPOINT}*"))
        ):
            return find_damage(folder)
        return f"{CHECKSUMS} is missing"

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, damaged or not; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, record: dict[str, Any]) -> None:
        """Starts writing the state at `step` and its record; does nothing if that step is already saved.

        The record must hold at least what a resume needs beside the state: the data's position and the config.

        Raises:
          StorageError: this checkpoint, or the one before it, could not be written.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
        self.wait()
        self._saving = step
        with self._storage_errors():
            self._manager.save(step, args=items, force=True)

    def check(self) -> None:
        """Raises StorageError if writing a checkpoint has failed in the meantime; does not wait."""
        with self._storage_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything that was saved is complete on disk, or raises StorageError."""
        with self._storage_errors():
            self._manager.wait_until_finished()

    def restore(self, like: TrainState, step: int | None = None) -> Checkpoint:
        """Reads the newest undamaged checkpoint, or that of `step`, into the shapes and layout of `like` (abstract).

        All processes must call it, and all read the same checkpoint. Newer checkpoints that are damaged are named in
        the log and moved to `checkpoints_damaged`.

        Raises:
          InputError: there is no checkpoint, all are damaged, or the one taken does not fit `like`.
        """
        layout = ocp.checkpoint_utils.construct_restore_args(like)
        state = ocp.args.PyTreeRestore(item=like, restore_args=layout)
        args = ocp.args.Composite(state=state, record=ocp.args.JsonRestore())
        items = self._newest_readable(lambda step: self._manager.restore(step, args=args), like, step)
        return Checkpoint(items.state, items.record)

    def restore_part(self, like: dict[str, Any], step: int | None = None) -> dict[str, Any]:
        """Reads only some arrays of the newest undamaged checkpoint, or of that of `step`: those of `like`.

        They are nested as in `TrainState`. Returns numpy arrays, nested as in `like`.

        Raises:
          InputError: there is no checkpoint, all are damaged, or the one taken has no such arrays.
        """
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        part = ocp.args.PyTreeRestore(item=like, restore_args=kinds, partial_restore=True)
        args = ocp.args.Composite(state=part)
        return self._newest_readable(lambda step: self._manager.restore(step, args=args).state, like, step)

    def _newest_readable(self, read: Callable[[int], T], like: Any, step: int | None = None) -> T:
        """What `read` returns for the newest checkpoint (or that of `step`) that is not damaged."""
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        if not steps:
            raise InputError(f"no checkpoint in {self._folder}")
        damaged = {}
        for candidate in steps:
            try:
                result = self._read(read, like, candidate)
            except _DamagedError as error:
                damaged[candidate] = str(error)
                continue
            for number, reason in damaged.items():
                self._set_aside(number, reason)
            logging.info("restored step %d from %s", candidate, self._folder)
            return result
        # All damaged checkpoints stay where they are: a run without any would begin again from step 0.
        found = "; ".join(f"step {number}: {reason}" for number, reason in damaged.items())
        raise InputError(f"no undamaged checkpoint in {self._folder} ({found}): start again in another workdir")

    def _read(self, read: Callable[[int], T], like: Any, step: int) -> T:
        """What `read` returns; raises _DamagedError in all processes if the checkpoint is damaged."""
        folder = self._folder / f"step_{step}"
        if damage := _first_text(self._damage(folder) if jax.process_index() == 0 else ""):
            raise _DamagedError(damage)
        if differences := self._differences(step, like):
            raise InputError(f"the checkpoint of step {step} in {self._folder} does not fit: {differences}")
        try:
            result, failure = read(step), ""
        except _READ_ERRORS as error:
            failure = brief(error)
        if damage := _first_text(failure):
            raise _DamagedError(damage)
        return result

    def _differences(self, step: int, like: Any) -> str:
        """Names arrays of `like` that the checkpoint lacks or has in another shape; empty if it cannot be compared."""
        try:
            there = self._manager.item_metadata(step)["state"]
            shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(there)}
        except (*_READ_ERRORS, AttributeError):
            return ""
        wanted = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(like)}
        found = [
            f"{name} {list(shapes[name])} instead of {list(shape)}" if name in shapes else f"{name} is not there"
            for name, shape in wanted.items()
            if shapes.get(name) != shape
        ]
        return ", ".join(found[:10])

    def _set_aside(self, step: int, reason: str) -> None:
        """Logs that a checkpoint is damaged; unless read-only, moves it away, so that its step can be saved again."""
        source = self._folder / f"step_{step}"
        if self._read_only:
            logging.warning("%s is damaged and was passed over: %s", source, reason)
            return
        target = self._workdir / DAMAGED / source.name
        if jax.process_index() == 0:
            count = 1
            while target.exists():
                count += 1
                target = target.with_name(f"{source.name}_{count}")
            with self._storage_errors():
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
        _first_text("")  # the other processes wait here until it has been moved
        self._manager.reload()
        logging.warning("%s is damaged and was moved to %s: %s", source, target.parent, reason)

    def _write_checksums(self) -> None:
        """Writes the checksums of the checkpoint that is being saved.

        Orbax calls this in the first process, in the thread that saves, when all files are there. It renames the folder
        only after that, so every checkpoint with its final name has its checksums.
        """
        name = f"step_{self._saving}"
        (folder,) = (path for path in self._folder.iterdir() if path.name.split(".")[0] == name)
        if not (folder / "state" / MERGED).exists():
            raise RuntimeError("Orbax merged nothing, so the arrays could not be read")
        write_checksums(folder, leave_out={STAMP})

    def _storage_errors(self) -> AbstractContextManager[None]:
        """Turns errors while a checkpoint is written, here or in the thread that saves, into StorageError."""
        what = "checkpoints" if self._saving is None else f"step {self._saving}"
        return saving_errors(what, self._workdir)


def _first_text(text: str) -> str:
    """The first text that is not empty among those of all processes, which must all call this; empty if none is."""
    return text if jax.process_count() == 1 else next(filter(None, gather_texts(text)), "")
