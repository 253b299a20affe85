"""Config files, wherever they lie: what they may import, and one line for whatever they raise."""

import contextlib
import os
import re
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvq_jax.runtime.errors import InputError

_PACKAGE = Path(__file__).parents[1]
_SHARED = "configs"  # the package that config files import from
# Code that a config file only calls: an error is shown at the last line that is not of these.
_CALLED = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(_PACKAGE))


def let_import(path: str | os.PathLike[str]) -> None:
    """Lets the config file import what it expects, in whatever folder the program was started.

    That is `configs` of the checkout that the file lies in, or else of the checkout that this package comes from; and
    the files beside it. InputError if the config file cannot be read.
    """
    folder = Path(path).absolute().parent
    own = [above for above in (folder, *folder.parents) if (above / _SHARED / "__init__.py").is_file()]
    before = [str(above) for above in own[:1]]  # another folder of that name, where one was started, must not hide it
    with explained(path), open(path):
        pass
    sys.path[:0] = [name for name in before if name not in sys.path]
    sys.path += [name for name in (str(_PACKAGE.parent), str(folder)) if name not in sys.path]


def run_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The names that a config file defines. InputError, with file and line, if it cannot be run."""
    let_import(path)
    with explained(path):
        return runpy.run_path(os.fspath(path))


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever the code of a config file raises inside the block into an InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(explain(error, path)) from error


def explain(error: Exception, path: str | os.PathLike[str]) -> str:
    """What is wrong with a config file, with file, line and cause.

    What this package refuses (`InputError`) explains itself.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and _file(error.filename) == _file(path):
        return f"the config file {os.fspath(path)} cannot be read: {error.strerror}"
    where = _where(error, path)
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one error into another
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, SyntaxError):  # str of it ends in where it is
        text = error.msg
    text = re.sub(r"Other fields present:.*?(?=Did you mean|$)", "", text, flags=re.DOTALL)
    if isinstance(error, ModuleNotFoundError) and error.name == _SHARED:
        text += ", which is a folder of the checkout of this package: give a config file inside one, or copy the folder"
    if not isinstance(error, AttributeError | KeyError | ImportError | SyntaxError) or not text.strip():
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return f"the config file cannot be used: {' '.join(text.split())} ({where})"


def _where(error: Exception, path: str | os.PathLike[str]) -> str:
    """The line of the config file, or of what it imports, that an error comes from."""
    if isinstance(error, SyntaxError) and error.filename:
        line = (error.text or "").strip()
        return f"{_short(error.filename)}, line {error.lineno}" + (f": {line}" if line else "")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename[0] != "<" and not frame.filename.startswith(_CALLED)]
    started = [place for place, frame in enumerate(own) if _file(frame.filename) == _file(path)]
    if not started:
        return _short(path)
    return f"{_short(own[-1].filename)}, line {own[-1].lineno}: {own[-1].line}"


def _file(path: object) -> str:
    return os.path.realpath(path) if isinstance(path, str | os.PathLike) else ""


def _short(path: str | os.PathLike[str]) -> str:
    """A path as it is shorter: from the working folder, or as a whole."""
    whole = os.path.abspath(path)
    relative = os.path.relpath(whole)
    return whole if relative.startswith(os.pardir) else relative
