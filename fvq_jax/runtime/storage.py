"""Turns errors of the disk (full, read-only, broken) into one error that names the last good checkpoint."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fvq_jax.runtime.errors import InputError, RunError, StorageError, require

# In the workdir of a run. The config is that of its latest start, and the history has a line for every start.
CHECKPOINTS, CONFIG, HISTORY, PROVENANCE = "checkpoints", "config.json", "config_history.jsonl", "provenance.json"
REPORT = "report"  # also in the folder of an evaluation
# Follows the name of a checkpoint's folder until the checkpoint is complete.
UNFINISHED_CHECKPOINT = ".orbax-checkpoint-tmp"
# The disk is full, over quota, read-only, broken, or gone: errors that a mistake in the program would not raise.
_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_SAID = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error")


@contextlib.contextmanager
def storage_errors(workdir: Path) -> Iterator[None]:
    """Turns errors of the disk that are raised inside the block into StorageError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ERRNOS:
            raise
        raise not_written("a file of the run", workdir, error) from error


@contextlib.contextmanager
def saving_errors(what: str, workdir: Path) -> Iterator[None]:
    """Turns errors while `what` is saved into StorageError, since libraries raise errors of the disk as many kinds."""
    try:
        yield
    except (InputError, RunError):
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise not_written(what, workdir, error) from error


def not_written(what: str, workdir: Path, error: Exception) -> StorageError:
    """The error that says that `what` was not written, and which checkpoint the run can continue from."""
    steps = complete_steps(workdir)
    kept = "there is no complete checkpoint yet: start again from the beginning"
    if steps:
        kept = f"the checkpoint of step {max(steps)} is complete: start again to go on from it"
    return StorageError(f"{what} could not be written in {workdir}: {brief(error)}; {kept}")


def complete_steps(workdir: Path) -> list[int]:
    """The steps of all complete checkpoints; one that was not completed has, also, a folder with a longer name."""
    names = {path.name for path in (workdir / CHECKPOINTS).glob("step_*")}
    matches = [re.fullmatch(r"step_(\d+)", name) for name in names]
    moving = {name.partition(UNFINISHED_CHECKPOINT)[0] for name in names if UNFINISHED_CHECKPOINT in name}
    return [int(match[1]) for match in matches if match and match[0] not in moving]


def require_prompt_listing(workdir: Path) -> None:
    """InputError unless the folder lists a new file at once: checkpoints are put together from such lists."""
    probe = workdir / f"listed.{os.getpid()}"
    try:
        probe.touch()
        listed = probe.name in os.listdir(workdir)
        probe.unlink()
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from None
    require(
        listed,
        f"the file system of {workdir} does not list a file as soon as it is written, so that checkpoints would be "
        "incomplete: use a workdir on another one, such as a local disk",
    )


def split_step(path: Path) -> tuple[Path, int | None]:
    """The workdir and the step that a path WORKDIR/checkpoints/step_N names; any other path as it is, and None.

    InputError if that workdir has no complete checkpoint of the step.
    """
    found = re.fullmatch(r"step_(\d+)", path.name)
    workdir = path.parent.parent
    if not found or path.parent.name != CHECKPOINTS or not (workdir / CONFIG).exists():
        return path, None
    steps = sorted(complete_steps(workdir))
    there = f"its checkpoints are of step {', '.join(map(str, steps))}" if steps else "it has no checkpoint"
    require(int(found[1]) in steps, f"there is no checkpoint of step {found[1]} in {workdir}: {there}")
    return workdir, int(found[1])


def brief(error: BaseException) -> str:
    """The part of an error's text that a person needs: the operating system's words, if the error comes from it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip() or type(error).__name__
    said = _SAID.search(text)
    return said.group() if said else text.splitlines()[0]
