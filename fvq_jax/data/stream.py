"""The order in which a stream shows examples, the share of each host, and the threads or processes that read ahead.

A training stream is endless and a pure function of (seed, step): it depends neither on the number of hosts nor on the
number of workers, and a run resumes at step s by asking for step s. What is read is left to `pipeline` (pictures) and
`codes`.
"""

import gc
import os
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from fvq_jax.data.worker import follow_parent
from fvq_jax.runtime.errors import InputError, require

_MAX_THREADS = 4


class Stream(Iterator[dict[str, np.ndarray]]):
    """Iterator over one host's batches, read ahead. Call `close` to stop the workers early.

    Iteration raises InputError as the loading of an example does, and RuntimeError when a worker process has died.

    Attributes:
      skipped: the files that could not be read so far, by name, and how often each was replaced.
    """

    def __init__(self, dataset: grain.MapDataset, num_workers: int):
        """Reads with a few threads of this process if `num_workers` is 0, otherwise with that many processes."""
        self.skipped: dict[str, int] = {}
        # Each worker builds every num_workers-th batch, so the order is that of one process.
        threads = 0 if num_workers else min(_MAX_THREADS, os.cpu_count() or 1)
        batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain hands the flags on to its processes; not every program has flags
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options, worker_init_fn=follow_parent)
        self._iterator: grain.DatasetIterator | None = iter(batches)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise StopIteration
        try:
            columns = next(self._iterator)
        except InputError as error:  # Grain has added lines to its message
            raise InputError(str(error).partition("\n")[0]) from None
        # Copied out of the memory shared with the worker: that memory is freed when its last reference goes, and a
        # device array on the host may hold a reference until the program ends.
        return {name: np.array(column) for name, column in columns.items()}

    def close(self) -> None:
        """Stops threads and worker processes; the iterator has ended then."""
        if self._iterator is not None:
            self._iterator.close()
            # It is part of a circle, and holds the last batch of every worker in shared memory, which Python would
            # warn of at the end of the program.
            self._iterator = None
            gc.collect()


def endless_order(length: int, seed: int) -> grain.MapDataset:
    """The numbers 0 to `length` - 1, over and over: each once per epoch, in an order that seed and epoch decide.

    Raises InputError for a seed that cannot be used.
    """
    require(0 <= seed < 2**32, f"seed={seed} cannot order the data: use 0 to {2**32 - 1}")
    return grain.MapDataset.range(length).seed(seed).shuffle().repeat()


def padded_order(length: int, batch_size: int) -> grain.MapDataset:
    """The numbers from 0 on, once: as many as fill whole batches. Those from `length` on stand for no example."""
    return grain.MapDataset.range(-(-length // max(1, batch_size)) * max(1, batch_size))


def local_batches(
    dataset: grain.MapDataset, batch_size: int, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """The part of one process of global batches of `batch_size`, from step `start_step` on.

    With b = batch_size / process_count, process p gets rows [p*b, (p+1)*b) of each. Raises InputError unless the
    processes can share a batch evenly.
    """
    require(
        batch_size > 0 and batch_size % process_count == 0,
        f"batch size {batch_size} must be a positive multiple of the {process_count} processes",
    )
    # Batches have one host's size, and each host takes its own: contiguous rows of the global batch.
    batches = dataset.batch(batch_size // process_count, drop_remainder=True)
    return batches[start_step * process_count + process_index :: process_count]
