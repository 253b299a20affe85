"""Pictures as they lie on disk, all of one size, in batches: what is scored as it was saved, or compared with.

An .npz of ADM's programs is read by `npz_rows.ImageReader`. Here are folders and other sources.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from fvq_jax.data.decode import open_stored
from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.npz_rows import ImageReader
from fvq_jax.data.pipeline import eval_batches
from fvq_jax.data.record import Source
from fvq_jax.data.sources import kind_of, make_source
from fvq_jax.data.transforms import resize_center
from fvq_jax.data.unreadable import UNREADABLE
from fvq_jax.runtime.errors import InputError, require


@runtime_checkable
class StoredPictures(Protocol):
    """Pictures of one size; `shape` is [N, H, W, 3].

    `labels` are the class of each picture [N], or None, and `classes` the names of the classes, or ().
    """

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        ...

    @property
    def labels(self) -> Int64[np.ndarray, "n"] | None:  # noqa: D102
        ...

    @property
    def classes(self) -> Sequence[str]:  # noqa: D102
        ...

    def __len__(self) -> int: ...

    def batches(self, size: int, *, part: int = 0, parts: int = 1) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The pictures in order, at most `size` at a time. Of several hosts, each gets every `parts`-th batch.

        A file that cannot be read is left out; too many of them are an error, see `unreadable.allowed`.
        """
        ...


class SourcePictures:
    """The pictures of a source, each made square with `size` pixels along a side by `crop`."""

    def __init__(
        self,
        source: Source,
        size: int,
        crop: Callable[[Image.Image, int], UInt8[np.ndarray, "s s 3"]],
        labels: Int64[np.ndarray, "n"] | None = None,
        classes: Sequence[str] = (),
    ):
        self.shape: tuple[int, ...] = (len(source), size, size, 3)
        self.labels, self.classes = labels, classes
        self._source, self._crop = source, crop

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, size: int, *, part: int = 0, parts: int = 1) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """See `StoredPictures`."""
        place = {"process_index": part, "process_count": parts}
        batches = eval_batches(
            self._source, image_size=self.shape[1], batch_size=size * parts, crop=self._crop, **place
        )
        try:
            for batch in batches:
                yield batch["image"][batch["mask"]]
        finally:
            batches.close()


def open_samples(path: str | os.PathLike[str]) -> StoredPictures:
    """Generated pictures: an .npz with `arr_0`, or a folder of picture files.

    The files of a folder are taken as they are and must be square and all of one size. If they lie in a folder per
    class, their order is shuffled, the same way every time: for the Inception Score the classes must be mixed.

    Raises:
      InputError: there are no such pictures; `batches` raises it for a file of another size.
    """
    if not os.path.isdir(path):
        return ImageReader(path)
    folder = FolderSource(path)
    size = _side(folder)
    labels = np.array([folder.label(index) for index in range(len(folder))], np.int64)
    if len(folder.classes) < 2:
        return SourcePictures(folder, size, _as_it_is)
    mixed = Sample(folder, len(folder))
    order = [mixed.index(position) for position in range(len(mixed))]
    return SourcePictures(mixed, size, _as_it_is, labels[order], folder.classes)


def open_real(path: str, size: int) -> StoredPictures:
    """Real pictures that a command line names: `photos`, a folder, or one that `fvq_jax.data.prepare` wrote.

    Each is resized and cropped as ADM does, to `size` pixels. InputError if there are none.
    """
    source = make_source(kind_of(path), "eval", image_size=size, eval_dir=path)
    return SourcePictures(source, size, resize_center)


def _side(folder: FolderSource) -> int:
    """The side of the first picture that can be read."""
    for index in range(len(folder)):
        try:
            width, height = open_stored(folder[index]["image"]).size
        except UNREADABLE:
            continue
        require(width == height, f"{folder.name(index)} has {width} x {height} pixels: samples must be square")
        return width
    raise InputError(f"no picture in {Path(folder.name(0)).parent} can be read")


def _as_it_is(image: Image.Image, size: int) -> UInt8[np.ndarray, "s s 3"]:
    if image.size != (size, size):
        raise InputError(
            f"samples must have one size: one has {image.width} x {image.height} pixels, the first {size} x {size}"
        )
    return np.asarray(image)
