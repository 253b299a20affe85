"""Reads .safetensors files: a single one, or the parts named by an index beside them (NAME.safetensors.index.json)."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from fvq_jax.runtime.errors import InputError, one_line, require
from fvq_jax.runtime.files import read_json
from fvq_jax.runtime.paths import require_content

INDEX = ".safetensors.index.json"  # the end of its name
_SHOWN = 4  # names in a message


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of a .safetensors file or of an index of such files."""
    return str(path).endswith((".safetensors", INDEX))


def read_safetensors(
    path: str | os.PathLike[str], track: Callable[[Iterable[str]], Iterable[str]] = iter
) -> dict[str, np.ndarray]:
    """The tensors of a file, or those that an index names; `track` wraps their names while they are read.

    InputError, in one line, if a file is missing or damaged, or lacks a tensor that the index places there, and if the
    index names a file that is not beside it.
    """
    places = {name: part for part, names in _parts(path).items() for name in names}
    tensors: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as stack:
        file: Any = None
        opened: str | os.PathLike[str] = ""
        for name in track(places):
            if places[name] != opened:
                stack.close()
                opened = places[name]
                file = stack.enter_context(_open(opened))
            tensors[name] = file.get_tensor(name)
    return tensors


def safetensors_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors that `read_safetensors` gives; reads no tensor. The same errors."""
    return [name for names in _parts(path).values() for name in names]


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What stands beside the tensors of a file, or of all parts that an index names. Errors of `read_safetensors`."""
    facts: dict[str, str] = {}
    for part in _parts(path):
        with _open(part) as file:
            facts |= file.metadata() or {}
    return facts


def _parts(path: str | os.PathLike[str]) -> dict[str | os.PathLike[str], list[str]]:
    """The files to read, and the names of the tensors to read from each."""
    if not str(path).endswith(INDEX):
        with _open(path) as file:
            return {path: list(file.keys())}
    require_content(path)
    index = Path(path)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{index} is no index of .safetensors files: it has no weight_map")
    parts: dict[str | os.PathLike[str], list[str]] = {}
    for name, part in places.items():
        plain = isinstance(part, str) and part.endswith(".safetensors") and not set(part) & {"/", "\\", "\0"}
        require(plain, f"{index} places tensors in {part!r}, which is not the name of a .safetensors file beside it")
        parts.setdefault(index.parent / part, []).append(name)
    for file_path, names in parts.items():
        require(
            os.path.isfile(file_path),
            f"{file_path} is missing: {index.name} names {len(parts)} files, and all of them are needed",
        )
        with _open(file_path) as file:
            there = set(file.keys())
        missing = [name for name in names if name not in there]
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        require(
            not missing,
            f"{file_path} lacks {', '.join(missing[:_SHOWN])}{more}, which {index.name} places there: "
            "these files do not belong together",
        )
    return parts


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A .safetensors file, open for reading. InputError if it is missing or damaged."""
    require_content(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({one_line(error)})") from error
