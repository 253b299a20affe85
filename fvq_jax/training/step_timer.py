"""The wall time of the training loop, divided into waiting for data and computing."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class StepTimes(NamedTuple):
    """What a window of steps took: `data` and `compute` in seconds per step, and the rate over both."""

    steps: int
    data: float
    compute: float
    examples_per_second: float


class StepTimer:
    """Splits the wall time of the loop into waiting for data and everything else (compute), pauses left out.

    Steps are dispatched asynchronously, so a single step cannot be timed from the host; a window of them can,
    if its end waits for the device: call `read` (and enter `paused`) after the metrics of the last step have
    arrived on the host. If the next batch is not there yet, the loop should wait for its step before it enters
    `data`: then `data` is the time in which the devices had nothing to do but wait for input. Time spent inside
    `paused` (evaluation, checkpoints) counts nowhere.
    """

    def __init__(self, batch_size: int, *, clock: Callable[[], float] = time.perf_counter):
        self._batch_size = batch_size
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._start, self._steps, self._waited, self._paused = self._clock(), 0, 0.0, 0.0

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """A context for fetching the next batch: its time counts as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context for what is not training (evaluation, checkpoints, reports): its time is left out."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def step(self) -> None:
        """Counts one step (of `batch_size` examples over all devices) that was dispatched."""
        self._steps += 1

    def read(self) -> StepTimes:
        """Returns the times since the last `read` (zeros if no step was made), and starts a new window."""
        training = self._clock() - self._start - self._paused
        steps, waited = self._steps, self._waited
        self._reset()
        if steps == 0 or training <= 0.0:
            return StepTimes(steps, 0.0, 0.0, 0.0)
        return StepTimes(steps, waited / steps, (training - waited) / steps, steps * self._batch_size / training)
