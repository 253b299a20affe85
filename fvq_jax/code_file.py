"""Files of codes: an .npz with `codes` int32 [N, h, w] and `names` [N], written and read a few rows at a time.

An array in an .npz starts with its shape, and how many rows there will be is known only at the end. So the rows first
go to a temporary file beside the target, which exists only once it is whole. `numpy.load` reads the result.
"""

import io
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from fvq_jax.errors import InputError

_BUFFER = 1 << 20


class CodeWriter:
    """Collects rows of codes with their names; a context manager, which writes `path` if no exception leaves it.

    Memory does not grow with the number of rows. InputError if the folder of `path` cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int):
        self._path = Path(path)
        self._shape = (height, width)
        self._longest = 1
        self.rows = 0
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._codes = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 (__exit__ closes it)
            self._names = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def __enter__(self) -> "CodeWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        with self._codes, self._names:
            if kind is None:
                self._finish()

    def write(self, codes: Int[np.ndarray, "n h w"], names: list[str]) -> None:
        """Adds rows."""
        if codes.shape != (len(names), *self._shape):
            raise ValueError(f"codes {codes.shape} do not fit {len(names)} names and rows of {self._shape}")
        self._codes.write(np.ascontiguousarray(codes, "<i4").tobytes())
        for name in names:
            self._longest = max(self._longest, len(name))
            encoded = name.encode("utf-8", "surrogateescape")
            self._names.write(len(encoded).to_bytes(4, "little") + encoded)
        self.rows += len(names)

    def _finish(self) -> None:
        unfinished = self._path.with_name(f"{self._path.name}.unfinished")
        name_type = np.dtype(f"<U{self._longest}")
        try:
            with zipfile.ZipFile(unfinished, "w") as archive:
                with archive.open("codes.npy", "w", force_zip64=True) as member:
                    _write_header(member, np.dtype("<i4"), (self.rows, *self._shape))
                    self._codes.seek(0)
                    shutil.copyfileobj(self._codes, member, _BUFFER)
                with archive.open("names.npy", "w", force_zip64=True) as member:
                    _write_header(member, name_type, (self.rows,))
                    self._names.seek(0)
                    for _ in range(self.rows):
                        length = int.from_bytes(self._names.read(4), "little")
                        # Bytes of a file name that are no text become question marks: an .npz cannot hold them.
                        name = self._names.read(length).decode("utf-8", "replace")
                        member.write(np.array([name], name_type).tobytes())
            os.replace(unfinished, self._path)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        finally:
            unfinished.unlink(missing_ok=True)


class CodeReader:
    """The rows of a file of codes; `shape` is that of `codes`. InputError if `path` is no such file."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                with archive.open("codes.npy") as member:
                    self.shape, self._type = _read_header(member)
                with archive.open("names.npy") as member:
                    names, self._name_type = _read_header(member)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read codes from {path}: {reason}") from error
        right = len(self.shape) == 3 and self._type.kind in "iu" and self._name_type.kind == "U"
        if not right or names != self.shape[:1]:
            raise InputError(
                f"{path} is no file of codes: it needs whole numbers `codes` [N, h, w] and text `names` [N], and has "
                f"{self._type} {list(self.shape)} and {self._name_type} {list(names)}"
            )

    def batches(self, size: int) -> Iterator[tuple[Int[np.ndarray, "n h w"], list[str]]]:
        """The rows with their names, at most `size` at a time. InputError if the file is damaged."""
        with (
            zipfile.ZipFile(self._path) as archive,
            archive.open("codes.npy") as codes,
            archive.open("names.npy") as names,
        ):
            _read_header(codes)
            _read_header(names)
            for start in range(0, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                rows = self._read(codes, self._type, (count, *self.shape[1:]))
                yield rows, self._read(names, self._name_type, (count,)).tolist()

    def _read(self, member: io.BufferedIOBase, dtype: np.dtype, shape: Iterable[int]) -> np.ndarray:
        shape = tuple(shape)
        needed = dtype.itemsize * int(np.prod(shape))
        try:
            content = member.read(needed)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{self._path} is damaged: {error}") from error
        if len(content) < needed:
            raise InputError(f"{self._path} is damaged: it ends early")
        return np.frombuffer(content, dtype).reshape(shape)


def _write_header(member: io.BufferedIOBase, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def _read_header(member: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(member)
    if fortran_order:
        raise ValueError("its arrays are stored by columns")
    return shape, dtype
