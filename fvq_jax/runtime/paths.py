"""Paths as people give them: `~` for the home directory, and characters that a library takes for a pattern."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fvq_jax.runtime.errors import InputError

_HOME = re.compile(r"(^|[=,])(~[\w.-]*)(?=/|,|$)")
_POINTER = b"version https://git-lfs.github.com/spec/v1"
POINTER_ADVICE = (
    "a Git-LFS pointer and not the file itself: run `git lfs pull` where it was cloned, or download the file"
)
_PATTERN = re.compile(r"[*?\[\]\\]")


def with_home(arguments: Sequence[str]) -> list[str]:
    """Replaces `~` and `~user` at the start of arguments, of their values and after commas.

    A shell does so at the start of a word only: it leaves `--workdir=~/runs` as it is.
    """
    return [_HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), text) for text in arguments]


def require_no_pattern(folder: Path) -> None:
    """InputError if the path, made absolute, has a character by which Orbax, which globs, would not find its files."""
    if found := _PATTERN.search(str(folder.absolute())):
        raise InputError(
            f"the path {folder} has a {found.group()!r}, with which checkpoints could not be read: "
            f"use another folder, or rename this one"
        )


def require_there(path: str | os.PathLike[str], what: str) -> Path:
    """The path, with `~` as the home directory. InputError unless a file or a folder is there; `what` should be."""
    try:
        found = Path(path).expanduser()
        found.stat()
    except FileNotFoundError:
        raise InputError(f"there is no {what} at {path}: the path does not exist") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"there is no {what} at {str(path)!r}: {reason}") from None
    require_content(found)
    return found


def require_content(path: str | os.PathLike[str]) -> None:
    """InputError for what is no file with its content: a pipe, a socket or a device, and a pointer of Git-LFS.

    Reading one of the first three could wait for ever. What is not there, or cannot be opened, is left to the reader.
    """
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = file.read(len(_POINTER))
            if is_pointer(start):
                raise InputError(f"{path} is {POINTER_ADVICE}")
    elif os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{path} is a pipe, a socket or a device, and no file or folder")


def is_pointer(content: bytes) -> bool:
    """Whether a file that starts like this is what Git leaves in place of a large one that it has not fetched."""
    return content.startswith(_POINTER)
