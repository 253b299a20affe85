"""The folder that samples are collected in: whole parts of them, so that a program that is killed can go on.

`sampling.json` says what is sampled. `parts/` holds files of pictures, named by the numbers of the first one and of the
one after the last; a part is there whole or not at all. What is made of the parts is left to the caller.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import UNFINISHED, replace_whole

SETTINGS, PARTS = "sampling.json", "parts"
_NAME = re.compile(r"(\d+)-(\d+)\.npy")


class SampleFolder:
    """The samples in a folder that were made with `settings`, plain JSON that decides every one of them.

    InputError if the folder holds samples of other settings or something else, or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]):
        self._path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        known = self._read()
        there = known.get("settings", self._settings)
        names = [name for name in {**there, **self._settings} if there.get(name) != self._settings.get(name)]
        if names:
            shown = ", ".join(
                f"{name} is {there.get(name)} there and {self._settings.get(name)} here" for name in names
            )
            raise InputError(f"{path} holds samples that were made differently: {shown}; use another folder")
        self.result: dict[str, Any] | None = known.get("result")
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            if not known and any(not path.name.endswith(UNFINISHED) for path in self._path.iterdir()):
                raise InputError(f"{path} holds something else: give a new or empty folder")
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror or error}") from error
        if not known:
            self._write()

    @property
    def done(self) -> int:
        """How many samples are in whole parts, without a gap."""
        return max((end for _, end, _ in self._chain()), default=0)

    def add(self, images: UInt8[np.ndarray, "n H W 3"]) -> None:
        """Writes the next part."""
        start = self.done
        try:
            (self._path / PARTS).mkdir(exist_ok=True)
            with (
                replace_whole(self._path / PARTS / f"{start:08d}-{start + len(images):08d}.npy") as unfinished,
                unfinished.open("wb") as file,
            ):
                np.save(file, images)
        except OSError as error:
            raise InputError(f"cannot write to {self._path}: {error.strerror or error}") from error

    def parts(self) -> Iterator[tuple[int, UInt8[np.ndarray, "n H W 3"]]]:
        """The number of the first sample of each part, and the part."""
        for start, _, path in self._chain():
            try:
                yield start, np.load(path)
            except (OSError, ValueError) as error:
                raise InputError(f"{path} is damaged: remove it, and start again: {error}") from error

    def finish(self, result: dict[str, Any], *, keep_parts: bool) -> None:
        """Notes the result of the finished work; unless `keep_parts`, the parts are removed."""
        self.result = result
        self._write()
        if not keep_parts:
            shutil.rmtree(self._path / PARTS)

    def _chain(self) -> Iterator[tuple[int, int, Path]]:
        found = {}
        for path in (self._path / PARTS).glob("*.npy"):
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = (int(match[2]), path)
        start = 0
        while start in found:
            end, path = found[start]
            yield start, end, path
            start = end

    def _read(self) -> dict[str, Any]:
        path = self._path / SETTINGS
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} cannot be read: it does not hold names and values")
        return content

    def _write(self) -> None:
        content = {"settings": self._settings, **({"result": self.result} if self.result else {})}
        try:
            with replace_whole(self._path / SETTINGS) as unfinished:
                unfinished.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write to {self._path}: {error.strerror or error}") from error
