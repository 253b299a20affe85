import itertools
import multiprocessing
import signal
import threading
import time

import numpy as np
import pytest

from fvq_jax.data import prefetch
from fvq_jax.data.prefetch import Prefetch
from fvq_jax.runtime.errors import DataError, InputError


class Numbers:
    """0, 1, ... up to `count`, where `event` happens."""

    def __init__(self, count, event=None):
        self.asked, self.closed = 0, threading.Event()
        self._count, self._event = count, event

    def __iter__(self):
        return self

    def __next__(self):
        if self.asked == self._count:
            if self._event is None:
                raise StopIteration
            self._event()
        self.asked += 1
        return self.asked - 1

    def close(self):
        self.closed.set()


def raise_error(error):
    raise error


def test_batches_come_placed_in_order_and_end_where_they_end():
    numbers = Numbers(5)
    batches = Prefetch(numbers, lambda number: np.full(2, number))
    assert [batch.tolist() for batch in batches] == [[number, number] for number in range(5)]
    batches.close()
    assert numbers.closed.is_set()


def test_two_batches_are_made_in_advance_and_no_more():
    numbers = Numbers(100)
    placed = []
    batches = Prefetch(numbers, placed.append)
    next(batches)
    deadline = time.monotonic() + 60
    while len(placed) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(placed) == 3
    batches.close()
    assert numbers.closed.is_set()


def test_a_batch_that_does_not_come_is_an_error_in_time_and_closing_does_not_wait_for_it():
    hang = threading.Event()
    batches = Prefetch(Numbers(2, hang.wait), abs, timeout=0.3)
    assert list(itertools.islice(batches, 2)) == [0, 1]
    began = time.monotonic()
    with pytest.raises(DataError, match=r"no batch for 0\.3 s: .*a training run waits as long as its data\.timeout"):
        next(batches)
    assert 0.2 < time.monotonic() - began < 30
    batches.close()
    assert time.monotonic() - began < 60
    hang.set()


def test_closing_ends_the_workers_of_these_batches_and_no_others(monkeypatch):
    """An evaluation that does not end well must not take the workers of training with it."""
    monkeypatch.setattr(prefetch, "_CLOSING", 0.1)
    spawn, hang = multiprocessing.get_context("spawn"), threading.Event()
    other, own = (spawn.Process(target=time.sleep, args=(60,), name=f"grain-{i}", daemon=True) for i in range(2))
    other.start()
    batches = Prefetch(Numbers(0, hang.wait), abs)
    own.start()
    batches.close()
    own.join(30)
    assert own.exitcode == -signal.SIGKILL
    assert other.is_alive()
    other.kill()
    hang.set()


def test_the_first_batch_may_take_longer():
    batches = Prefetch(Numbers(0, lambda: time.sleep(1.5)), abs, timeout=1.0)
    assert next(batches) == 0
    batches.close()


@pytest.mark.parametrize("timeout", [0.0, 1e300])  # longer than any clock goes
def test_without_a_timeout_it_waits(timeout):
    batches = Prefetch(Numbers(0, lambda: time.sleep(0.5)), abs, timeout=timeout)
    assert next(batches) == 0
    batches.close()


@pytest.mark.parametrize(
    ("raised", "seen", "match"),
    [
        (InputError("3 of 4 pictures are unreadable"), InputError, "3 of 4"),
        (
            RuntimeError("Worker process was terminated\nmore"),
            DataError,
            "^no more batches: Worker process was terminated$",
        ),
    ],
)
def test_what_the_source_raises_comes_where_the_batch_is_asked_for(raised, seen, match):
    batches = Prefetch(Numbers(1, lambda: raise_error(raised)), abs)
    assert next(batches) == 0
    with pytest.raises(seen, match=match):
        next(batches)
    batches.close()
