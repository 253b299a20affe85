import io
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fvq_jax.data.prefetch import Prefetch
from fvq_jax.training.metric_files import MetricWriter, read_metrics
from fvq_jax.training.progress import Progress
from fvq_jax.training.step_timer import StepTimer


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def tensorboard(workdir):
    accumulator = EventAccumulator(str(workdir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def curve(workdir, name):
    return [(event.step, event.value) for event in tensorboard(workdir).Scalars(name)]


def write_curve(workdir, steps, *, start_step, value=0.0):
    with MetricWriter(workdir, start_step=start_step, active=True) as writer:
        for step in steps:
            writer.scalars(step, {"loss/total": step + value})


def test_scalars_reach_both_files(tmp_path):
    with MetricWriter(tmp_path, start_step=0, active=True) as writer:
        writer.scalars(10, {"loss/total": jnp.float32(0.5), "usage/window": np.float32(0.25), "mfu": 0})
        writer.scalars(20, {"loss/total": 0.25})
    expected = [{"step": 10, "loss/total": 0.5, "usage/window": 0.25, "mfu": 0.0}, {"step": 20, "loss/total": 0.25}]
    assert read_metrics(tmp_path) == expected
    assert curve(tmp_path, "loss/total") == [(10, 0.5), (20, 0.25)]
    assert curve(tmp_path, "usage/window") == [(10, 0.25)]


def test_non_finite_values_are_null_in_strict_json(tmp_path):
    with MetricWriter(tmp_path, start_step=0, active=True) as writer:
        writer.scalars(1, {"loss/total": math.nan, "loss/codebook": -math.inf, "loss/commitment": 1.0})

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss/total": None, "loss/codebook": None, "loss/commitment": 1.0}
    write_curve(tmp_path, [2], start_step=1)  # a resumed run keeps the nulls
    assert read_metrics(tmp_path)[0] == row


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with MetricWriter(tmp_path, start_step=0, active=True) as writer:
        writer.scalars(1, {"mfu": 0.5})
        assert read_metrics(tmp_path) == [{"step": 1, "mfu": 0.5}]


def test_a_resumed_run_drops_what_it_will_log_again(tmp_path):
    write_curve(tmp_path, [10, 20, 30, 40], start_step=0)
    write_curve(tmp_path, [30, 40, 50], start_step=20, value=0.5)
    points = [(10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5), (50, 50.5)]
    assert [(row["step"], row["loss/total"]) for row in read_metrics(tmp_path)] == points
    assert curve(tmp_path, "loss/total") == points
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_run_that_starts_again_from_the_beginning_starts_afresh(tmp_path):
    write_curve(tmp_path, [0, 10], start_step=0)
    with MetricWriter(tmp_path, start_step=0, active=True):
        assert read_metrics(tmp_path) == []


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    write_curve(tmp_path, [10], start_step=0)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 20, "loss/to')
    assert [row["step"] for row in read_metrics(tmp_path)] == [10]
    write_curve(tmp_path, [20], start_step=15)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]


def test_metrics_of_an_empty_workdir(tmp_path):
    assert read_metrics(tmp_path) == []


def test_other_processes_write_nothing(tmp_path):
    workdir = tmp_path / "run"
    with MetricWriter(workdir, start_step=0, active=False) as writer:
        writer.scalars(1, {"loss/total": 1.0})
        writer.image(1, "grid", np.zeros((2, 2, 3), np.uint8))
        writer.histogram(1, "codes", np.ones(4, np.int32))
        writer.flush()
    assert not workdir.exists()


def test_closing_twice(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0, active=True)
    writer.close()
    writer.close()


def test_images_reach_tensorboard(tmp_path):
    with MetricWriter(tmp_path, start_step=0, active=True) as writer:
        writer.image(7, "reconstructions", np.full((6, 9, 3), 200, np.uint8))
    (event,) = tensorboard(tmp_path).Images("reconstructions")
    assert (event.step, event.width, event.height) == (7, 9, 6)


def histogram_of(tmp_path, counts):
    with MetricWriter(tmp_path, start_step=0, active=True) as writer:
        writer.histogram(3, "codes", counts)
    (event,) = tensorboard(tmp_path).Histograms("codes")
    assert event.step == 3
    return event.histogram_value


def test_histogram_of_few_codes_has_a_bucket_for_each(tmp_path):
    histogram = histogram_of(tmp_path, jnp.array([0, 5, 0, 2], jnp.int32))
    assert list(histogram.bucket) == [0, 5, 0, 2]
    assert list(histogram.bucket_limit) == [1, 2, 3, 4]
    assert (histogram.num, histogram.min, histogram.max) == (7, 1, 3)
    assert histogram.sum == 5 * 1 + 2 * 3
    assert histogram.sum_squares == 5 * 1 + 2 * 9


def test_histogram_of_many_codes_shares_buckets(tmp_path):
    counts = np.random.default_rng(0).integers(0, 9, 5000).astype(np.int32)
    histogram = histogram_of(tmp_path, counts)
    limits = np.array(histogram.bucket_limit, int)
    assert len(limits) == 512
    assert limits[-1] == 5000
    np.testing.assert_array_equal(histogram.bucket, [part.sum() for part in np.split(counts, limits[:-1])])


def test_histogram_of_an_empty_window(tmp_path):
    assert sum(histogram_of(tmp_path, np.zeros(3, np.int32)).bucket) == 0


@pytest.fixture
def log_lines(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda message, *arguments: lines.append(message % arguments))
    return lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_without_a_terminal_is_a_line_per_logged_step(log_lines, capsys):
    clock = Clock()
    with Progress(100, 0, clock=clock) as progress:
        clock.now += 50.0  # compilation
        progress.update(9)
        progress.update(10, loss=0.12345, usage=0.5, images_per_second=321.04)
        clock.now += 5.0
        progress.update(20, loss=0.1, usage=1.0, images_per_second=320.0)
    assert log_lines == [
        "step 10/100, loss 0.1235, usage 50.0%, images/s 321.0, ETA 07:30",
        "step 20/100, loss 0.1000, usage 100.0%, images/s 320.0, ETA 00:40",
    ]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_of_a_resumed_run_counts_only_its_own_steps(log_lines):
    clock = Clock()
    progress = Progress(100, 80, clock=clock)
    clock.now += 10.0
    progress.update(90, loss=1.0)
    assert log_lines == ["step 90/100, loss 1.0000, ETA 00:10"]


def test_progress_on_a_terminal_is_a_bar_on_standard_error(log_lines, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, 40) as progress:
        progress.update(50, loss=0.12345, usage=0.5, images_per_second=321.04)
    assert "40/100" in terminal.getvalue()
    last = terminal.getvalue().split("\r")[-1]
    for part in ("50%", "50/100", "loss=0.1235", "usage=50.0%", "images/s=321.0"):
        assert part in last
    assert log_lines == []
    assert capsys.readouterr().out == ""


def test_progress_of_other_processes_is_silent(log_lines, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, 0, active=False) as progress:
        progress.update(10, loss=1.0)
    assert terminal.getvalue() == ""
    assert log_lines == []


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
    assert times.images_per_second == pytest.approx(16 / 2.0)


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


def test_after_tensorboards_thread_has_ended_writing_is_an_error_and_does_not_wait(tmp_path):
    with MetricWriter(tmp_path, start_step=0, active=True) as writer:
        writer._tensorboard.file_writer.event_writer._worker.stop()  # as it does at the first error of the disk
        with pytest.raises(OSError, match="TensorBoard's files could not be written"):
            writer.scalars(1, {"loss": 1.0})
