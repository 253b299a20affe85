"""A thread that gets batches ahead of time and places them on the devices; an error if the next one does not come.

The iterator that is wrapped makes the batches, and ends the processes that it uses.
"""

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from fvq_jax.runtime.errors import DataError, InputError

_START = 5  # the first batch may take this many times the timeout, since workers start and import first
_CLOSING = 3.0  # seconds, after which what does not close is left behind
T = TypeVar("T", covariant=True)


@runtime_checkable
class Closable(Iterator[Any], Protocol):
    """An iterator that other threads and processes may work for."""

    def close(self) -> None:
        """Ends them."""


class Prefetch(Iterator[T]):
    """`place(batch)` for every one of `batches`, in their order, up to two of them in advance.

    Iteration raises DataError if the next one has not come after `timeout` seconds (the first after five times as long;
    0: it waits for ever), or if a worker process has died. An InputError of `batches` is raised as it is, any other
    exception as a DataError. `close` does not wait for what hangs.
    """

    def __init__(self, batches: Closable, place: Callable[[Any], T], *, timeout: float = 0.0):
        self._batches = batches
        self._place = place
        self._timeout = timeout
        self._patience = _START * timeout
        self._others = set(
            multiprocessing.active_children()
        )  # not ours to end: training has its own during an evaluation
        self._placed: queue.Queue[tuple[T] | Exception] = queue.Queue(1)  # a second one waits in `_fill` for room
        self._closed = threading.Event()
        self._filling = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._filling.start()

    def __next__(self) -> T:
        try:
            placed = self._placed.get(timeout=min(self._patience, threading.TIMEOUT_MAX) or None)
        except queue.Empty:
            raise DataError(
                f"no batch for {self._patience:g} s: a picture cannot be read, or its file system does not answer; "
                "start again when it does (if it is only slow: a training run waits as long as its data.timeout)"
            ) from None
        self._patience = self._timeout
        if isinstance(placed, InputError | StopIteration):
            raise placed
        if isinstance(placed, Exception):
            raise DataError(f"no more batches: {str(placed).strip().splitlines()[0]}") from placed
        return placed[0]

    def ready(self) -> bool:
        """Whether the next batch, or what ends them, is there."""
        return not self._placed.empty()

    def close(self) -> None:
        """Ends thread and workers; the iterator cannot be used afterwards."""
        self._closed.set()
        while not self._placed.empty():  # `_fill` may wait for room
            self._placed.get()
        closing = threading.Thread(target=self._close, daemon=True)
        closing.start()
        closing.join(_CLOSING)
        if closing.is_alive():  # workers ignore SIGTERM, and the interpreter would wait for them
            for child in set(multiprocessing.active_children()) - self._others:
                if child.name.startswith("grain-"):
                    child.kill()

    def _close(self) -> None:
        self._filling.join()
        self._batches.close()

    def _fill(self) -> None:
        try:
            for batch in self._batches:
                self._placed.put((self._place(batch),))
                if self._closed.is_set():
                    return
            self._placed.put(StopIteration())
        except Exception as error:  # raised again where the batch is asked for
            self._placed.put(error)
