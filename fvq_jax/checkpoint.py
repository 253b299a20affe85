"""Checkpoints of a run: the whole training state, the position in the data, and the config, through Orbax.

Saving is asynchronous; a checkpoint that was not completed is never seen by `latest_step`.
"""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import struct

from fvq_jax.errors import InputError
from fvq_jax.sharding import path_name
from fvq_jax.state import TrainState

# Of arrays that several devices hold, each writes a part, if that has at least so many bytes. Cutting small arrays
# compiles a program for every part: 200 of them, and most of the time of a first save, for a tiny network.
SMALLEST_PART = 2**20


@struct.dataclass
class Checkpoint:
    """What was read back: the state, laid out as asked for, and the record saved beside it (plain JSON)."""

    state: TrainState
    record: dict[str, Any] = struct.field(pytree_node=False)


class Checkpoints:
    """The checkpoints of one workdir: `keep_last` newest, and every `keep_every` steps one for good (0: none)."""

    def __init__(self, workdir: str | os.PathLike[str], *, keep_last: int = 1, keep_every: int = 0):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, step_prefix="step", enable_async_checkpointing=True
        )
        self._folder = Path(workdir).absolute() / "checkpoints"
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_PART)
        kinds = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=kinds),
            "record": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, record: dict[str, Any]) -> None:
        """Starts writing the state at `step` and its record; a step that is already there is left alone.

        The record must hold at least what a resume needs beside the state: the data's position and the config.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState, step: int | None = None) -> Checkpoint:
        """Reads the newest (or a given) checkpoint into the shapes and layout of `like` (abstract arrays).

        Raises:
          InputError: there is none, or it does not fit `like`.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise InputError(f"no checkpoint in {self._folder}")
        layout = ocp.checkpoint_utils.construct_restore_args(like)
        state = ocp.args.PyTreeRestore(item=like, restore_args=layout)
        args = ocp.args.Composite(state=state, record=ocp.args.JsonRestore())
        try:
            items = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"the checkpoint of step {step} in {self._folder} does not fit this config: {reason}"
            ) from error
        logging.info("restored step %d from %s", step, self._folder)
        return Checkpoint(items.state, items.record)

    def restore_part(self, like: dict[str, Any]) -> dict[str, Any]:
        """Reads of the newest state only the arrays of `like` (nested by the fields of `TrainState`), as numpy arrays.

        Raises:
          InputError: there is no checkpoint, or it has no such arrays.
        """
        step = self.latest_step()
        if step is None:
            raise InputError(f"no checkpoint in {self._folder}")
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        part = ocp.args.PyTreeRestore(item=like, restore_args=kinds, partial_restore=True)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=part)).state
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"cannot read the checkpoint of step {step} in {self._folder}: {reason}") from error
        wrong = [
            f"{path_name(path)} {list(array.shape)} instead of {list(wanted.shape)}"
            for (path, wanted), array in zip(jax.tree.leaves_with_path(like), jax.tree.leaves(restored), strict=True)
            if array.shape != wanted.shape
        ]
        if wrong:
            raise InputError(
                f"the checkpoint of step {step} in {self._folder} has other shapes: {', '.join(wrong[:10])}"
            )
        logging.info("read step %d from %s", step, self._folder)
        return restored

    def wait(self) -> None:
        """Returns when everything that was saved is complete on disk."""
        self._manager.wait_until_finished()
