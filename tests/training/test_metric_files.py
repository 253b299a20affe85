import json
import math
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fvq_jax.runtime.errors import InputError
from fvq_jax.training.metric_files import MetricWriter, read_metrics


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


@pytest.mark.parametrize(
    "content", ["{}\n", "[1]\n", "no metrics\n", '{"step": 1}\n\0\n{"step": 2}\n', '{"step": "1"}\n']
)
def test_damage_other_than_a_cut_line_is_named(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged: .*; move it away"):
        read_metrics(tmp_path)


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


def test_after_tensorboards_thread_has_ended_writing_is_an_error_and_does_not_wait(tmp_path):
    with MetricWriter(tmp_path, start_step=0, active=True) as writer:
        writer._tensorboard.file_writer.event_writer._worker.stop()  # as it does at the first error of the disk
        with pytest.raises(OSError, match="TensorBoard's files could not be written"):
            writer.scalars(1, {"loss": 1.0})


def test_a_thread_that_dies_while_a_step_is_logged_holds_nothing_up(tmp_path):
    """Neither what is added before that is noticed, more than its queue and a pipe hold, nor the end of the program."""
    program = f"""
        import sys, threading
        from fvq_jax.training.metric_files import MetricWriter
        threading.excepthook = lambda failed: None
        writer = MetricWriter({str(tmp_path)!r}, start_step=0, active=True)
        inner = writer._tensorboard.file_writer.event_writer

        def full(event):
            raise OSError(28, "No space left on device")

        inner._ev_writer.write_event = full
        for step in range(300):
            writer.histogram(step, "codes", range(1, 513))
        inner._worker.join()
        try:
            writer.scalars(1, {{"x": 1.0}})
        except OSError as error:
            print(error.strerror)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "TensorBoard's files could not be written\n"
    assert result.returncode == 0, result.stderr
