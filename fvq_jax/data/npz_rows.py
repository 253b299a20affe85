"""Files of rows: an .npz that is written and read a few rows at a time, so that memory does not grow with the file.

Codes: `codes` int32 [N, h, w], or of another shape behind N, and `names` [N]. Images: `arr_0` uint8 [N, H, W, 3],
which the evaluation suite of ADM (guided-diffusion) reads. An array in an .npz starts with its shape, but the number of
rows is known only at the end. So the rows first go to temporary files beside the target, and the target appears once it
is whole. `numpy.load` reads it.
"""

import contextlib
import io
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from jaxtyping import Int, UInt8

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole
from fvq_jax.runtime.paths import require_no_device

_BUFFER = 1 << 20
_Writer = TypeVar("_Writer", bound="_RowWriter")
_Member = IO[bytes] | io.BufferedIOBase  # an array inside an .npz
_Array = tuple[str, np.dtype, tuple[int, ...], Iterable[bytes]]  # name, type, shape of a row, content


class _RowWriter:
    """A context manager that collects rows. It writes `path` at its end, unless there was an exception.

    With `active=False` (every process but the first) nothing is written. InputError if the folder of `path` cannot be
    written to, or the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str], columns: int, *, active: bool = True):
        self.rows = 0
        self._path, self._active = Path(path), active
        self._columns: list[io.BufferedRandom] = []
        if not active:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            folder = self._path.parent
            self._columns = [tempfile.TemporaryFile(dir=folder) for _ in range(columns)]  # noqa: SIM115 (see __exit__)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None and self._active:
                self._finish()
        finally:
            for column in self._columns:
                column.close()

    def _add(self, rows: int, *contents: bytes) -> None:
        if not self._active:
            return
        try:
            for column, content in zip(self._columns, contents, strict=True):
                column.write(content)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        self.rows += rows

    def _finish(self) -> None:
        try:
            with replace_whole(self._path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
                for column, (name, dtype, shape, content) in zip(self._columns, self._arrays(), strict=True):
                    column.seek(0)
                    kind = np.lib.format.dtype_to_descr(dtype)
                    header = {"descr": kind, "fortran_order": False, "shape": (self.rows, *shape)}
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array_header_1_0(member, header)
                        for chunk in content:
                            member.write(chunk)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error

    def _arrays(self) -> Iterator[_Array]:
        """The array of every column. Its content is read once the column's temporary file is back at its start."""
        raise NotImplementedError

    def _chunks(self, column: int) -> Iterator[bytes]:
        return iter(lambda: self._columns[column].read(_BUFFER), b"")


class ImageWriter(_RowWriter):
    """Collects images of one size; `labels`, the classes of all of them in order, become `arr_1`, as in ADM's files."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        *,
        labels: Int[np.ndarray, "n"] | None = None,
        active: bool = True,
    ):
        super().__init__(path, 1 if labels is None else 2, active=active)
        self._shape, self._labels = (height, width, 3), labels

    def write(self, images: UInt8[np.ndarray, "n H W 3"]) -> None:
        """Adds images."""
        if images.shape[1:] != self._shape:
            raise ValueError(f"images {images.shape} do not fit rows of {self._shape}")
        contents = [np.ascontiguousarray(images).tobytes()]
        if self._labels is not None:
            own = self._labels[self.rows : self.rows + len(images)]
            if len(own) < len(images):
                raise ValueError(f"there are labels of {len(self._labels)} images only")
            contents.append(own.astype("<i8").tobytes())
        self._add(len(images), *contents)

    def _arrays(self) -> Iterator[_Array]:
        yield "arr_0", np.dtype("|u1"), self._shape, self._chunks(0)
        if self._labels is not None:
            yield "arr_1", np.dtype("<i8"), (), self._chunks(1)


class CodeWriter(_RowWriter):
    """Collects rows of codes with their names."""

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, ...]):
        """`shape` is that of the codes of one image."""
        super().__init__(path, 2)
        self._shape = shape
        self._longest = 1

    def write(self, codes: Int[np.ndarray, "n ..."], names: list[str]) -> None:
        """Adds rows."""
        if codes.shape != (len(names), *self._shape):
            raise ValueError(f"codes {codes.shape} do not fit {len(names)} names and rows of {self._shape}")
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._longest = max([self._longest, *map(len, names)])
        self._add(
            len(names),
            np.ascontiguousarray(codes, "<i4").tobytes(),
            b"".join(len(name).to_bytes(4, "little") + name for name in encoded),
        )

    def _arrays(self) -> Iterator[_Array]:
        yield "codes", np.dtype("<i4"), self._shape, self._chunks(0)
        name_type = np.dtype(f"<U{self._longest}")
        yield "names", name_type, (), self._padded_names(name_type)

    def _padded_names(self, name_type: np.dtype) -> Iterator[bytes]:
        column = self._columns[1]
        for _ in range(self.rows):
            length = int.from_bytes(column.read(4), "little")
            # Bytes of a file name that are not UTF-8 become the replacement character U+FFFD: an .npz cannot hold them.
            name = column.read(length).decode("utf-8", "replace")
            yield np.array([name], name_type).tobytes()


class CodeReader:
    """The rows of a file of codes; `shape` is that of `codes`. InputError if `path` is no such file.

    A file without `names` counts: its rows are named by their numbers.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        require_no_device(path)
        try:
            with zipfile.ZipFile(path) as archive:
                with archive.open("codes.npy") as member:
                    self.shape, self._type = _read_header(member)
                self._named = "names.npy" in archive.namelist()
                names, self._name_type = self.shape[:1], np.dtype("U1")
                if self._named:
                    with archive.open("names.npy") as member:
                        names, self._name_type = _read_header(member)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read codes from {path}: {reason}") from error
        right = len(self.shape) >= 2 and self._type.kind in "iu" and self._name_type.kind == "U"
        if not right or names != self.shape[:1]:
            raise InputError(
                f"{path} is no file of codes: it needs whole numbers `codes` [N, h, w], or of another shape behind N, "
                f"and text `names` [N] or none, and has "
                f"{self._type} {list(self.shape)} and {self._name_type} {list(names)}"
            )

    def batches(self, size: int) -> Iterator[tuple[Int[np.ndarray, "n ..."], list[str]]]:
        """The rows with their names, at most `size` at a time. InputError if the file is damaged."""
        with contextlib.ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self._path))
            codes = stack.enter_context(archive.open("codes.npy"))
            names = stack.enter_context(archive.open("names.npy")) if self._named else None
            for member in filter(None, (codes, names)):
                _read_header(member)
            digits = max(5, len(str(self.shape[0])))
            for start in range(0, self.shape[0], size):
                count = min(size, self.shape[0] - start)
                rows = self._read(codes, self._type, (count, *self.shape[1:]))
                numbers = [f"{row:0{digits}d}" for row in range(start, start + count)]
                yield rows, numbers if names is None else self._read(names, self._name_type, (count,)).tolist()

    def _read(self, member: _Member, dtype: np.dtype, shape: Iterable[int]) -> np.ndarray:
        return _read_rows(self._path, member, dtype, tuple(shape))


class ImageReader:
    """The pictures of an .npz as ADM's programs write them: `arr_0` uint8 [N, H, W, 3]; `shape` is that of `arr_0`.

    `labels` int64 [N] are those in `arr_1`, which ADM's programs write for class-conditional samples; None without
    them. InputError if `path` holds no such pictures.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self.labels: np.ndarray | None = None
        self.classes: Sequence[str] = ()  # such files hold no names
        require_no_device(path)
        try:
            with zipfile.ZipFile(path) as archive:
                with archive.open("arr_0.npy") as member:
                    self.shape, dtype = _read_header(member)
                if "arr_1.npy" in archive.namelist():
                    with archive.open("arr_1.npy") as member:
                        shape, kind = _read_header(member)
                        if kind.kind in "iu" and shape == self.shape[:1]:
                            self.labels = _read_rows(self._path, member, kind, shape).astype(np.int64)
        except KeyError as error:
            raise InputError(f"{path} holds no pictures: it needs an array arr_0, uint8 [N, H, W, 3]") from error
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"cannot read pictures from {path}: {getattr(error, 'strerror', None) or error}"
            ) from error
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] != 3 or 0 in self.shape:
            raise InputError(
                f"{path} holds no pictures: arr_0 must be uint8 [N, H, W, 3], not {dtype} {list(self.shape)}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, *, part: int = 0, parts: int = 1) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The pictures in order, at most `size` at a time. InputError if the file is damaged.

        Of several hosts, each gets its `part`: every `parts`-th batch.
        """
        with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            for number, start in enumerate(range(0, len(self), size)):
                shape = (min(size, len(self) - start), *self.shape[1:])
                rows = _read_rows(self._path, member, np.dtype(np.uint8), shape)
                if number % parts == part:
                    yield rows


def _read_rows(path: Path, member: _Member, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    needed = dtype.itemsize * math.prod(shape)
    try:
        content = member.read(needed)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if len(content) < needed:
        raise InputError(f"{path} is damaged: it ends early")
    return np.frombuffer(content, dtype).reshape(shape)


def _read_header(member: _Member) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(member)
    if fortran_order:
        raise ValueError("its arrays are stored by columns")
    return shape, dtype
