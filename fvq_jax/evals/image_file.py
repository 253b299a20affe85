"""Images as one .npz with `arr_0` uint8 [N, H, W, 3], which the evaluation suite of ADM (guided-diffusion) reads."""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fvq_jax.errors import InputError


class ImageWriter:
    """Collects images of one size; a context manager, which writes `path` if no exception leaves it.

    Memory does not grow with their number: they wait in a temporary file beside the target. With `active=False` (every
    process but the first) nothing is written. InputError if the folder of `path` cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int, *, active: bool = True):
        self._path = Path(path)
        self._shape = (height, width, 3)
        self._active = active
        self.rows = 0
        if not active:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._pixels = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 (__exit__ closes it)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if not self._active:
            return
        with self._pixels:
            if kind is None:
                self._finish()

    def write(self, images: UInt8[np.ndarray, "n H W 3"]) -> None:
        """Adds images. InputError if the disk is full."""
        if images.shape[1:] != self._shape:
            raise ValueError(f"images {images.shape} do not fit rows of {self._shape}")
        if not self._active:
            return
        try:
            self._pixels.write(np.ascontiguousarray(images).tobytes())
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        self.rows += len(images)

    def _finish(self) -> None:
        unfinished = self._path.with_name(f"{self._path.name}.unfinished")
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.rows, *self._shape)}
        try:
            with (
                zipfile.ZipFile(unfinished, "w") as archive,
                archive.open("arr_0.npy", "w", force_zip64=True) as member,
            ):
                np.lib.format.write_array_header_1_0(member, header)
                self._pixels.seek(0)
                shutil.copyfileobj(self._pixels, member, 1 << 20)
            os.replace(unfinished, self._path)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        finally:
            unfinished.unlink(missing_ok=True)
