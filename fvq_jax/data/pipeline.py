"""Batches of pictures by Grain: decoding, augmentation, and files that cannot be read.

`stream` has the order, the share of each host and the workers. Placing batches on devices and converting uint8 to
floats is left to the caller.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from fvq_jax.data.decode import open_stored
from fvq_jax.data.record import Source
from fvq_jax.data.stream import Stream, endless_order, local_batches, padded_order
from fvq_jax.data.transforms import random_flip, random_resize_crop, resize_center
from fvq_jax.data.unreadable import MAX_UNREADABLE, UNREADABLE, allowed, reason, short_name, too_many
from fvq_jax.runtime.errors import InputError

_GAVE_UP = -2  # less the index of a file: it and as many after it cannot be read as end a run


class Batches(Stream):
    """Iterator over one host's batches; counts the unreadable files that come by.

    `skipped` maps the name of each such file, below its folder, to how often it was replaced; every new one is logged
    with the reason. Iteration raises InputError once there are more of these files than `unreadable.allowed`, and
    RuntimeError when a worker process has died. Each host counts the files it sees. Call `close` to stop the workers
    early. `pictures` is how many different pictures the records are of.
    """

    def __init__(
        self, dataset: grain.MapDataset, source: Source, num_workers: int, max_unreadable: float | int, pictures: int
    ):
        super().__init__(dataset, num_workers)
        self._source, self._pictures, self._max_unreadable = source, pictures, max_unreadable
        self._found: list[tuple[str, str]] = []  # names and reasons

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        unreadable = batch.pop("unreadable")
        for index in unreadable[unreadable >= 0]:
            self._skip(int(index))
        for index in _GAVE_UP - unreadable[unreadable <= _GAVE_UP]:  # counted here, so that all of them are known
            for following in range(allowed(self._pictures, self._max_unreadable) + 1):
                self._skip((int(index) + following) % len(self._source))
        return batch

    def _skip(self, index: int) -> None:
        name = short_name(self._source, index)
        if name not in self.skipped:
            self._found.append((self._source.name(index), reason(self._source, index)))
            logging.warning("skipped %r: %s", *self._found[-1])
        self.skipped[name] = self.skipped.get(name, 0) + 1
        if len(self._found) > allowed(self._pictures, self._max_unreadable):
            raise too_many(self._found, self._pictures, self._max_unreadable)


def train_batches(
    source: Source,
    *,
    image_size: int,
    resize_min: int,
    resize_max: int,
    flip: bool,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    max_unreadable: float | int = MAX_UNREADABLE,
) -> Batches:
    """Endless augmented batches from step `start_step` on.

    `image` is uint8 [b, image_size, image_size, 3], `label` int32 [b]. `batch_size` is global; b =
    batch_size / process_count, and process p gets rows [p*b, (p+1)*b) of the global batch. All records come
    once per epoch, in an order that `seed` and the epoch decide. With `num_workers` 0 a few threads of
    this process read pictures, otherwise that many processes. `max_unreadable` is the share that may be unreadable, see
    `unreadable.allowed`. Raises InputError for sizes that cannot work.
    """
    if resize_min and not image_size <= resize_min <= resize_max:
        raise InputError(
            f"data.resize_min={resize_min} and data.resize_max={resize_max} cannot work: needed is "
            f"image_size ({image_size}) <= resize_min <= resize_max, or resize_min=0 for no resizing"
        )
    load = functools.partial(
        _load_to_train,
        source=source,
        image_size=image_size,
        resize_min=resize_min,
        resize_max=resize_max,
        flip=flip,
        max_unreadable=max_unreadable,
    )
    place = {"start_step": start_step, "process_index": process_index, "process_count": process_count}
    dataset = local_batches(endless_order(len(source), seed).random_map(load), batch_size, **place)
    return Batches(dataset, source, num_workers, max_unreadable, len(source))


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    crop: Callable[[Image.Image, int], UInt8[np.ndarray, "s s 3"]] = resize_center,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    max_unreadable: float | int = MAX_UNREADABLE,
    pictures: int | None = None,
) -> Batches:
    """Every picture once, in order and cropped by `crop`: `image` and `label` as in training, `mask` and `small` [b].

    `small` says whether a side of the picture is shorter than the crop, so that `crop` enlarges or frames it.

    Rows with a False `mask` must not count: they fill up the last batch, or stand in for an unreadable file. Every
    process gets the same number of batches, and the same part of each as in `train_batches`. `pictures` is how many
    different pictures the records are of, if that are fewer than records: `max_unreadable` is a share of them.
    """
    load = functools.partial(_load_to_score, source=source, image_size=image_size, crop=crop)
    place = {"process_index": process_index, "process_count": process_count}
    dataset = local_batches(padded_order(len(source), batch_size).map(load), batch_size, **place)
    return Batches(dataset, source, num_workers, max_unreadable, pictures or len(source))


def _open(source: Source, index: int, min_side: int = 0) -> tuple[Image.Image, np.int32]:
    """Picture and label; see `decode.open_stored`. Raises one of UNREADABLE."""
    record = source[index]
    return open_stored(record["image"], min_side), record["label"]


def _row(image: np.ndarray, label: np.int32, unreadable: int = -1) -> dict[str, Any]:
    """One row of a batch; `unreadable` is the index of the file that this row replaces, -1, or see `_GAVE_UP`."""
    return {"image": image, "label": label, "unreadable": np.int64(unreadable)}


def _load_to_train(
    index: int,
    rng: np.random.Generator,
    *,
    source: Source,
    image_size: int,
    resize_min: int,
    resize_max: int,
    flip: bool,
    max_unreadable: float | int,
) -> dict[str, Any]:
    failed: list[int] = []
    for candidate in itertools.chain(range(index, len(source)), range(index)):
        try:
            # The decoder may leave out what the augmentation would average away.
            image, label = _open(source, candidate, min_side=resize_max if resize_min else 0)
        except UNREADABLE:
            failed.append(candidate)
            if len(failed) > allowed(len(source), max_unreadable):
                break
            continue
        crop = random_resize_crop(image, rng, image_size, resize_min, resize_max)
        return _row(random_flip(crop, rng) if flip else crop, label, failed[0] if failed else -1)
    return _row(np.zeros((image_size, image_size, 3), np.uint8), np.int32(0), _GAVE_UP - failed[0])


def _load_to_score(
    position: int,
    *,
    source: Source,
    image_size: int,
    crop: Callable[[Image.Image, int], UInt8[np.ndarray, "s s 3"]],
) -> dict[str, Any]:
    nothing = np.zeros((image_size, image_size, 3), np.uint8)
    no_picture = {"mask": np.bool_(False), "small": np.bool_(False)}
    if position >= len(source):
        return _row(nothing, np.int32(0)) | no_picture
    try:
        record = source[position]
        image = open_stored(record["image"])
    except UNREADABLE:
        return _row(nothing, np.int32(0), position) | no_picture
    small = record.get("small", min(image.size) < image_size)
    return _row(crop(image, image_size), record["label"]) | {"mask": np.bool_(True), "small": np.bool_(small)}
