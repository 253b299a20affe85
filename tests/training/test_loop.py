"""The loop, on the second task (tests/helpers/regression.py); tests/tasks/tokenizer/test_runs.py runs tokenizers."""

import functools
import os
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fvq_jax.data.prefetch import Prefetch
from fvq_jax.runtime import clock
from fvq_jax.runtime.errors import InputError, NonFiniteError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.training import loop
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.loop import train
from fvq_jax.training.metric_files import read_metrics
from fvq_jax.training.step import TrainStep
from fvq_jax.training.step_timer import StepTimer
from tests.helpers.regression import RegressionTask, VectorBatches, Vectors, regression_config


def restored(config, workdir):
    mesh = make_mesh(config.mesh.data, config.mesh.codebook)
    step = TrainStep.of(RegressionTask(config, mesh), config, mesh, config.steps, 1)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(step.abstract()).state


def interrupt_before_step(patch, step):
    """SIGTERM arrives while the loop takes the batch of this step, counted from 0."""
    following, taken = Prefetch.__next__, []

    def interrupted(self):
        if len(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        taken.append(1)
        return following(self)

    patch.setattr(Prefetch, "__next__", interrupted)


def test_interrupted_evaluation_is_done_by_the_next_call(tmp_path, monkeypatch):
    config = regression_config(steps=2)
    evaluated = []

    def evaluate(self, state, progress, original=RegressionTask.evaluate):
        evaluated.append(int(state.step))
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, state, progress)

    with monkeypatch.context() as patch:
        patch.setattr(RegressionTask, "evaluate", evaluate)
        assert train(RegressionTask, config, tmp_path).interrupted
    assert evaluated == [2]
    result = train(RegressionTask, config, tmp_path)
    assert not result.interrupted
    assert result.summary["step"] == 2
    assert result.summary["vectors"] == 32


def test_goodput_counts_the_time_between_two_calls(tmp_path, monkeypatch):
    config = regression_config(**{"log.every_steps": 1, "eval.every_steps": 0})
    with monkeypatch.context() as patch:
        interrupt_before_step(patch, 2)
        assert train(RegressionTask, config, tmp_path).interrupted
    monkeypatch.setattr(clock, "wall", lambda: time.time() + 3600)
    train(RegressionTask, config, tmp_path)
    rows = [row["goodput"] for row in read_metrics(tmp_path) if "goodput" in row]
    assert rows[-1] < 0.1 * rows[0]


def slow_data(patch):
    """The step timer gets a clock by which a batch comes 5 s after the one before, and the devices need 3 s for it."""
    clock, block_until_ready = SimpleNamespace(now=0.0, batch_due=0.0, devices_done=0.0), jax.block_until_ready

    class SlowBatches(Prefetch):
        def ready(self):
            return clock.now >= clock.batch_due

        def __next__(self):
            batch = super().__next__()
            clock.now = max(clock.now, clock.batch_due)
            clock.batch_due, clock.devices_done = clock.now + 5, clock.now + 3
            return batch

    def wait(arrays):
        clock.now = max(clock.now, clock.devices_done)
        return block_until_ready(arrays)

    patch.setattr("fvq_jax.training.loop.Prefetch", SlowBatches)
    patch.setattr("fvq_jax.training.loop.StepTimer", functools.partial(StepTimer, clock=lambda: clock.now))
    patch.setattr(jax, "block_until_ready", wait)


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    """A run that logs, evaluates and keeps checkpoints at every second step: its workdir, and how often it traced.

    Its data are slow, see `slow_data`.
    """
    traces, original = [], TrainStep.__call__

    def counted(self, *args):
        traces.append(1)
        return original(self, *args)

    every = {"log.every_steps": 2, "eval.every_steps": 2}
    kept = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 1, "checkpoint.keep_every": 2}
    workdir = tmp_path_factory.mktemp("five")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", counted)
        slow_data(patch)
        train(RegressionTask, regression_config(steps=5, **every, **kept), workdir)
    return workdir, len(traces)


def test_the_step_is_traced_once(five_steps):
    assert five_steps[1] == 1


def test_a_window_covers_the_steps_since_the_last_log(five_steps):
    rows = [row for row in read_metrics(five_steps[0]) if "positive/window" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    batches = VectorBatches(Vectors("train"), 16, 0, 0)
    positive = [np.mean(np.sum(next(batches)["x"] > 0, axis=0)) for _ in range(5)]
    expected = [positive[0] + positive[1], positive[2] + positive[3], positive[4]]
    np.testing.assert_allclose([row["positive/window"] for row in rows], expected, rtol=1e-6)


def test_waiting_for_data_is_only_the_time_in_which_the_devices_have_no_work(five_steps):
    """2 s for every batch but the first, which is fetched before the clock is read; here per step of each window."""
    waited = [row["time/data"] for row in read_metrics(five_steps[0]) if "time/data" in row]
    assert waited == [(0 + 2) / 2, (2 + 2) / 2, 2 / 1]


def test_evaluates_every_so_many_steps(five_steps):
    assert [row["step"] for row in read_metrics(five_steps[0]) if "eval/error" in row] == [2, 4, 5]


def test_keeps_the_last_checkpoints_and_every_so_many_steps(five_steps):
    kept = sorted(path.name for path in (five_steps[0] / "checkpoints").iterdir())
    assert kept == ["step_2", "step_4", "step_5"]


def breaks_after_one_step(**changes):
    """The first update is so large that nothing is finite afterwards."""
    return regression_config(**{"steps": 3, "optim.learning_rate": 1e38, "optim.warmup_steps": 0, **changes})


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_a_step_that_is_not_finite_stops_the_run(tmp_path):
    config = breaks_after_one_step(**{"checkpoint.every_steps": 1})
    with pytest.raises(NonFiniteError, match=r"step 2: .*loss/total is (nan|inf)"):
        train(RegressionTask, config, tmp_path)
    assert int(restored(config, tmp_path).step) == 1


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    config = breaks_after_one_step(on_nan="skip", **{"eval.every_steps": 0})
    train(RegressionTask, config, tmp_path)
    state = restored(config, tmp_path)
    assert int(state.skipped) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [row["skipped_steps"] for row in read_metrics(tmp_path) if "skipped_steps" in row] == [0, 1, 2]


def test_a_run_that_skips_step_after_step_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    config = breaks_after_one_step(on_nan="skip", **{"eval.every_steps": 0, "steps": 9, "checkpoint.every_steps": 1})
    with pytest.raises(NonFiniteError, match=r"step 4: .*; 3 steps in a row were skipped, so no later one is likely"):
        train(RegressionTask, config, tmp_path)


def test_what_was_done_before_too_many_unreadable_files_is_saved(tmp_path, monkeypatch):
    following, taken = VectorBatches.__next__, []

    def fails(self):
        taken.append(1)
        if len(taken) == 3:
            raise InputError("2 of 3 pictures are unreadable")
        self.skipped["bad.png"] = 1
        return following(self)

    with monkeypatch.context() as patch:
        patch.setattr(VectorBatches, "__next__", fails)
        patch.setattr(Vectors, "fingerprint_without", lambda self, names: f"all but {names}", raising=False)
        config = regression_config(**{"checkpoint.every_steps": 100, "eval.every_steps": 0})
        with pytest.raises(InputError, match="2 of 3"):
            train(RegressionTask, config, tmp_path)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2
