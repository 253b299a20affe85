"""Batches of pictures by Grain: order, augmentation, batching, the share of each host, worker processes.

The training stream is endless and a pure function of (seed, step): it depends neither on the number of
hosts nor on the number of workers, and a run resumes at step s by asking for step s. Placing batches on
devices and converting uint8 to floats is left to the caller.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import logging

from fvq_jax.data import transforms
from fvq_jax.data.sources import Record, Source
from fvq_jax.errors import InputError

_MAX_THREADS = 4
_CORRUPT_LIMIT = 0.01


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over one host's batches; counts the unreadable files that come by.

    `skipped` maps the name of each such file to how often it was replaced; every new one is logged.
    Iteration raises InputError once they exceed 1 % of `files`, and RuntimeError when a worker process has
    died. Each host counts the files it sees. Call `close` to stop the workers early.
    """

    def __init__(self, dataset: grain.MapDataset, source: Source, files: int, num_workers: int):
        self.skipped: dict[str, int] = {}
        self._source = source
        self._files = files
        # Each worker builds every num_workers-th batch, so the order is that of one process.
        threads = 0 if num_workers else min(_MAX_THREADS, os.cpu_count() or 1)
        batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
        if num_workers:
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options, worker_init_fn=_init_worker)
        self._iterator = iter(batches)

    def __next__(self) -> dict[str, np.ndarray]:
        # Copied out of memory shared with the worker: that is freed when its last reference goes, and a device
        # array on the host may hold one until the program ends.
        batch = {name: np.array(column) for name, column in next(self._iterator).items()}
        corrupt = batch.pop("corrupt")
        for index in corrupt[corrupt >= 0]:
            self._skip(self._source.name(int(index)))
        return batch

    def close(self) -> None:
        """Stops threads and worker processes; the iterator cannot be used afterwards."""
        self._iterator.close()

    def _skip(self, name: str) -> None:
        if name not in self.skipped:
            logging.warning("skipped %r: not a readable picture (another takes its place)", name)
        self.skipped[name] = self.skipped.get(name, 0) + 1
        if len(self.skipped) > _CORRUPT_LIMIT * self._files:
            examples = ", ".join(map(repr, list(self.skipped)[:3]))
            raise InputError(
                f"{len(self.skipped)} of {self._files} pictures are unreadable, over {_CORRUPT_LIMIT:.0%}: "
                f"{examples}{', ...' if len(self.skipped) > 3 else ''}; repair or remove them"
            )


def steps_per_epoch(source: Source, batch_size: int) -> float:
    """Steps in which every record is used once; a fraction, as batches run across the end of an epoch."""
    return len(source) / batch_size


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
) -> Batches:
    """Endless augmented batches from step `start_step` on.

    `image` is uint8 [b, image_size, image_size, 3], `label` int32 [b]. `batch_size` is global; b =
    batch_size / process_count, and process p gets rows [p*b, (p+1)*b) of the global batch. All records come
    once per epoch, in an order that `seed` and the epoch decide. `num_workers` 0 uses a few threads of this
    process, else that many processes. Raises InputError for sizes that cannot work.
    """
    local_size = _local_batch_size(batch_size, process_count)
    if resize_min and not image_size <= resize_min <= resize_max:
        raise InputError(
            f"data.resize_min={resize_min} and data.resize_max={resize_max} cannot work: needed is "
            f"image_size ({image_size}) <= resize_min <= resize_max, or resize_min=0 for no resizing"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} cannot order the data: use 0 to {2**32 - 1}")
    augment = functools.partial(
        _augment, image_size=image_size, resize_min=resize_min, resize_max=resize_max, flip=flip
    )
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(augment)
    # Batches of one host's size, of which each host takes its own: contiguous rows of the global batch.
    dataset = dataset.batch(local_size, drop_remainder=True)
    dataset = dataset[start_step * process_count + process_index :: process_count]
    return Batches(dataset, source, len(source), num_workers)


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> Batches:
    """Every picture once, in order and centre-cropped: `image` and `label` as in training, `mask` bool [b].

    With a `limit`, that many pictures, evenly spaced over the source (the first ones would be of the first
    classes); 0 takes all. Rows with a False `mask` must not count: they fill up the last batch, or stand in
    for an unreadable file. Every process gets the same number of batches, and rows as in `train_batches`.
    """
    local_size = _local_batch_size(batch_size, process_count)
    count = min(limit or len(source), len(source))
    padded = -(-count // batch_size) * batch_size
    load = functools.partial(_load_for_eval, source=source, count=count, image_size=image_size)
    dataset = grain.MapDataset.range(padded).map(load)
    dataset = dataset.batch(local_size, drop_remainder=True)[process_index::process_count]
    return Batches(dataset, source, count, num_workers)


def _init_worker(index: int, count: int) -> None:
    """Lets a worker process end when the main process does, and not before.

    Schedulers send SIGTERM, and terminals SIGINT, to every process of a job; the main one still needs data
    for the steps up to its last checkpoint. If it is killed instead, no one would stop the workers.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size <= 0 or batch_size % process_count:
        raise InputError(f"batch size {batch_size} must be a positive multiple of the {process_count} processes")
    return batch_size // process_count


def _augment(
    record: Record, rng: np.random.Generator, *, image_size: int, resize_min: int, resize_max: int, flip: bool
) -> Record:
    image = transforms.random_resize_crop(record["image"], rng, image_size, resize_min, resize_max)
    if flip:
        image = transforms.random_flip(image, rng)
    return {**record, "image": image}


def _load_for_eval(position: int, *, source: Source, count: int, image_size: int) -> Record:
    if position >= count:
        image = np.zeros((image_size, image_size, 3), np.uint8)
        return {"image": image, "label": np.int32(0), "corrupt": np.int64(-1), "mask": np.bool_(False)}
    record = source[position * len(source) // count]
    image = transforms.center_crop(record["image"], image_size)
    return {**record, "image": image, "mask": np.bool_(record["corrupt"] < 0)}
