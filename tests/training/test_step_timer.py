import time

import jax
import pytest

from fvq_jax.data.prefetch import Prefetch
from fvq_jax.training.step_timer import StepTimer


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_step_timer_splits_the_wall_time():
    clock = Clock()
    timer = StepTimer(16, clock=clock)
    for _ in range(4):
        with timer.data():
            clock.now += 0.5
        timer.step()
        clock.now += 1.5
    with timer.paused():
        clock.now += 1000.0
    times = timer.read()
    assert times.steps == 4
    assert times.data == pytest.approx(0.5)
    assert times.compute == pytest.approx(1.5)
    assert times.examples_per_second == pytest.approx(16 / 2.0)


def test_step_timer_starts_a_new_window_at_every_reading():
    clock = Clock()
    timer = StepTimer(2, clock=clock)
    clock.now += 9.0
    timer.step()
    timer.read()
    clock.now += 1.0
    timer.step()
    assert timer.read() == (1, 0.0, 1.0, 2.0)
    assert timer.read() == (0, 0.0, 0.0, 0.0)


class Step:
    """Runs for `seconds` on a device once that is done with the step before; the host need not wait for it."""

    def __init__(self, seconds, before):
        self.end = max(time.monotonic(), before.end if before else 0.0) + seconds

    def block_until_ready(self):
        time.sleep(max(0.0, self.end - time.monotonic()))


class SlowBatches:
    """Endless, one every `seconds`."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.seconds)
        return 0

    def close(self):
        pass


@pytest.mark.parametrize(("batch_seconds", "low", "high"), [(0.45, 0.4, 0.8), (0.0, 0.0, 0.2)])
def test_waiting_for_data_is_what_the_device_waits(batch_seconds, low, high):
    """Steps of 0.15 s: with a batch every 0.45 s two thirds of the time are waiting, with one at once hardly any."""
    timer, step = StepTimer(1), None
    batches = Prefetch(SlowBatches(batch_seconds), lambda batch: batch)
    next(batches)
    timer.read()
    for _ in range(8):
        before, step = step, Step(0.15, step)
        timer.step()
        jax.block_until_ready(before)  # the loop reads its metrics
        if not batches.ready():
            jax.block_until_ready(step)
        with timer.data():
            next(batches)
    jax.block_until_ready(step)
    times = timer.read()
    batches.close()
    assert low <= times.data / (times.data + times.compute) <= high
