"""Reading files that may be damaged; writing them so that no reader sees half of one, and their folders; JSON."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.paths import require_content

UNFINISHED = ".unfinished"  # the end of the name of a file that is being written


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """Makes an InputError, which names the file, of whatever a library raises while it reads one.

    Damage makes zipfile, numpy and the like raise nearly anything: NotImplementedError, since a changed byte asks for a
    compression that there is not, TokenError, RuntimeError, struct.error and more.

    Args:
      path: the file.
      what: what is read from it, such as "codes"; empty for the file as a whole.
    """
    require_content(path)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise InputError(f"cannot read {what}{' from ' if what else ''}{path}: {reason}") from error


@contextlib.contextmanager
def replace_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the path of a new file beside `path`; when the block ends, the new file takes the place of `path`.

    If the block fails, the new file is removed and what was at `path` stays as it was. A process that is killed inside
    leaves a file whose name ends in `.unfinished`. Raises OSError like any write. If the file must survive a power
    failure, the caller calls `os.fsync` on it inside the block.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder for results, and the folders above it, unless it is there. InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, see `replace_whole`. InputError if that fails."""
    try:
        with replace_whole(path) as unfinished:
            unfinished.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON of dicts, lists and scalars; numbers that are not finite, of which JSON has none, are null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strict(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [strict(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(value), indent=indent, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. InputError if the file cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it does not hold names and values")
    return content
