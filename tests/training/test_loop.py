import functools
import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fvq_jax import evaluate
from fvq_jax.data import pipeline
from fvq_jax.data.prefetch import Prefetch
from fvq_jax.runtime.errors import InputError, NonFiniteError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.tasks import task_of
from fvq_jax.training import loop
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.metric_files import read_metrics
from fvq_jax.training.step import TrainStep
from fvq_jax.training.step_timer import StepTimer
from tests.helpers.same_bits import assert_same_bits
from tests.helpers.tiny import make_step, random_images, tiny_config

pytestmark = pytest.mark.usefixtures("no_drawing")

# Everything that has a state: discriminator, moving average, micro-batches, a rate of its own for the codebook.
WHOLE = {
    "adversarial.weight": 0.5,
    "adversarial.start": 2,
    "optim.ema_decay": 0.9,
    "optim.accumulate": 2,
    "optim.codebook_learning_rate": 2e-3,
    "checkpoint.every_steps": 2,
    "log.every_steps": 1,
}


def train(config, workdir, **options):
    return loop.train(task_of(config), config, workdir, **options)


def restored(config, workdir):
    step = make_step(config, make_mesh(config.mesh.data, config.mesh.codebook), config.steps, 1)
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(step.abstract())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps that nothing disturbed: its workdir and its result."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(tiny_config(**WHOLE), workdir, profile_steps=(2, 3))


def interrupt_before_step(monkeypatch, step, number=signal.SIGTERM):
    """The signal arrives while the loop fetches the batch of this step (counted from 0 in this call of `train`)."""
    fetched = {"batches": 0}

    def counted(original):
        def fetch(self):
            if threading.current_thread() is threading.main_thread():  # others fetch ahead
                if fetched["batches"] == step:
                    os.kill(os.getpid(), number)
                fetched["batches"] += 1
            return original(self)

        return fetch

    for kind in (Prefetch, pipeline.Batches):
        monkeypatch.setattr(kind, "__next__", counted(kind.__next__))


def test_stop_and_resume_gives_the_weights_of_never_stopping(finished, tmp_path, monkeypatch):
    """Stopped twice: after step 1, when there is no checkpoint yet, and after step 3, when one is a step old."""
    config = tiny_config(**WHOLE)
    for steps, stop_at in ((1, 1), (2, 3)):
        with monkeypatch.context() as patch:
            interrupt_before_step(patch, steps)
            assert train(config, tmp_path).interrupted
        assert int(restored(config, tmp_path).state.step) == stop_at
    result = train(config, tmp_path)
    assert not result.interrupted
    ours, theirs = restored(config, tmp_path), restored(config, finished[0])
    assert_same_bits(ours.state, theirs.state)
    assert (
        ours.record["data"]
        == theirs.record["data"]
        == {
            "next_step": 4,
            "seed": 0,
            "pictures": ours.record["data"]["pictures"],
        }
    )
    scores = ("psnr", "ssim", "l1", "mse", "usage", "perplexity", "step", "tokens")
    assert {name: result.summary[name] for name in scores} == {name: finished[1].summary[name] for name in scores}
    steps = [row["step"] for row in read_metrics(tmp_path) if "loss/total" in row]
    assert steps == [1, 2, 3, 4]


def test_interrupted_evaluation_is_done_by_the_next_call(tmp_path, monkeypatch):
    config = tiny_config(steps=2)
    with monkeypatch.context() as patch:
        interrupt_before_step(patch, 2, signal.SIGINT)  # two training batches, then one of the evaluation
        assert train(config, tmp_path).interrupted
    result = train(config, tmp_path)
    assert result.summary["step"] == 2
    assert result.summary["images"] == 24


def test_result_and_files_of_a_run(finished):
    workdir, result = finished
    summary = result.summary
    assert summary["step"] == 4
    assert summary["codebook_size"] == 64
    assert summary["images"] == 24
    assert summary["tokens"] == 24 * 8 * 8
    assert 0 < summary["usage"] <= 1
    assert 1 <= summary["perplexity"] <= 64
    assert summary["workdir"] == str(workdir)
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0
    json.dumps(summary, allow_nan=False)
    page = (workdir / "report" / "index.html").read_text()
    for shown in (
        "64 \N{MULTIPLICATION SIGN} 8 codes",
        f"{summary['psnr']:.2f}",
        "Codes used while training",
        "Losses",
    ):
        assert shown in page
    assert json.loads((workdir / "config.json").read_text())["tokenizer"]["quantizer"]["codebook_size"] == 64
    record = restored(tiny_config(**WHOLE), workdir).record
    assert record["config"]["optim"]["ema_decay"] == 0.9


def test_what_a_run_leaves_for_those_who_watch_it(finished):
    workdir = finished[0]
    heartbeat = json.loads((workdir / "heartbeat" / "host_000.json").read_text())
    assert (heartbeat["step"], heartbeat["phase"]) == (4, "done")
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    rows = [row for row in read_metrics(workdir) if "goodput" in row]
    assert all(0 < row["goodput"] < 1 for row in rows)
    assert all(row["time/longest_silence"] > 0 for row in rows)


def test_goodput_counts_the_time_between_two_calls(tmp_path, monkeypatch):
    config = tiny_config(**{"log.every_steps": 1, "steps": 2})
    with monkeypatch.context() as patch:
        interrupt_before_step(patch, 1)
        assert train(config, tmp_path).interrupted
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    train(config, tmp_path)
    before, after = (row["goodput"] for row in read_metrics(tmp_path) if "goodput" in row)
    assert after < 0.1 * before


def test_every_scalar_reaches_tensorboard(finished):
    events = EventAccumulator(str(finished[0] / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    losses = {"total", "reconstruction", "codebook", "commitment", "adversarial", "discriminator"}
    expected = {f"loss/{name}" for name in losses}
    expected |= {"grad_norm/tokenizer", "grad_norm/discriminator", "learning_rate", "usage/batch", "usage/window"}
    expected |= {"perplexity/window", "images_per_second", "time/data", "time/compute", "mfu", "memory/peak_bytes"}
    expected |= {"goodput", "time/longest_silence"}
    expected |= {"eval/psnr", "eval/ssim", "eval/usage", "eval/perplexity", "eval/dead_codes", "eval/bits_per_pixel"}
    assert expected <= scalars
    assert events.Tags()["images"] == ["reconstructions"]
    assert events.Tags()["histograms"] == ["codes/window"]


def test_evaluating_the_workdir_gives_the_scores_of_the_run(finished, tmp_path, capsys):
    """By the program, which computes on its own mesh, on the pictures that the workdir names."""
    workdir, result = finished
    assert evaluate.main([f"--workdir={workdir}", f"--out={tmp_path}", "--batch=16"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["images"], metrics["tokens"], metrics["size"]) == (24, 24 * 64, 16)
    for name in ("psnr", "ssim", "l1", "mse", "usage", "perplexity"):
        assert metrics[name] == pytest.approx(result.summary[name], rel=1e-4), name
    assert "Codes used while training" in (tmp_path / "report" / "index.html").read_text()


def test_evaluation_uses_the_moving_average(finished):
    config = tiny_config(**WHOLE)
    state = restored(config, finished[0]).state
    task = make_step(config, make_mesh(-1, 1)).task
    scored = task.scored_variables(state)
    assert scored.keys() == {"params"}
    assert_same_bits(scored["params"], state.ema)
    with pytest.raises(AssertionError):
        assert_same_bits(state.ema["encoder"], state.networks["tokenizer"].params["encoder"])


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
        train(tiny_config(steps=5, **every, **kept), workdir)
    return workdir, len(traces)


def test_the_step_is_traced_once(five_steps):
    assert five_steps[1] == 1


def test_window_usage_covers_the_steps_since_the_last_log(five_steps):
    rows = [row for row in read_metrics(five_steps[0]) if "usage/window" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["tokens/window"] for row in rows] == [2 * 16 * 64, 2 * 16 * 64, 16 * 64]


def test_waiting_for_data_is_only_the_time_in_which_the_devices_have_no_work(five_steps):
    """2 s for every batch but the first, which is fetched before the clock is read; here per step of each window."""
    waited = [row["time/data"] for row in read_metrics(five_steps[0]) if "time/data" in row]
    assert waited == [(0 + 2) / 2, (2 + 2) / 2, 2 / 1]


def test_evaluates_every_so_many_steps(five_steps):
    assert [row["step"] for row in read_metrics(five_steps[0]) if "eval/psnr" in row] == [2, 4, 5]


def test_keeps_the_last_checkpoints_and_every_so_many_steps(five_steps):
    kept = sorted(path.name for path in (five_steps[0] / "checkpoints").iterdir())
    assert kept == ["step_2", "step_4", "step_5"]


def test_another_model_or_data_does_not_continue(finished):
    for name, value in {"tokenizer.quantizer.bridge": "none", "data.flip": False, "seed": 1}.items():
        with pytest.raises(InputError, match=f"{name}: .* -> "):
            train(tiny_config(**WHOLE, **{name: value}), finished[0])


def test_a_lost_config_file_does_not_let_another_run_in(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(InputError, match="seed: 0 -> 7"):
        train(tiny_config(**WHOLE, seed=7), tmp_path / "copy")


def test_a_longer_run_continues_with_moved_pictures_and_not_with_others(tmp_path):
    for split in ("train", "eval"):
        (tmp_path / "old" / split).mkdir(parents=True)
        for i in range(16):
            Image.fromarray(random_images(1, 16, i)[0]).save(tmp_path / "old" / split / f"{i}.png")

    def config(root, steps):
        folders = {"data.train_dir": str(root / "train"), "data.eval_dir": str(root / "eval")}
        return tiny_config(steps=steps, **{"data.source": "folder", "log.every_steps": 1, **folders})

    train(config(tmp_path / "old", 2), tmp_path / "run")
    (tmp_path / "old").rename(tmp_path / "new")
    assert train(config(tmp_path / "new", 5), tmp_path / "run").summary["step"] == 5
    assert [row["data/skipped_files"] for row in read_metrics(tmp_path / "run") if "loss/total" in row] == [0] * 5
    (tmp_path / "new" / "train" / "0.png").rename(tmp_path / "new" / "train" / "00.png")
    with pytest.raises(InputError, match="images to train on are not those"):
        train(config(tmp_path / "new", 6), tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_a_step_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(steps=3, **{"optim.learning_rate": 1e38, "checkpoint.every_steps": 1, "optim.warmup_steps": 0})
    with pytest.raises(NonFiniteError, match=r"step 2: .*loss/total is (nan|inf)"):
        train(config, tmp_path)
    assert int(restored(config, tmp_path).state.step) == 1


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    changes = {"optim.learning_rate": 1e38, "on_nan": "skip", "log.every_steps": 1, "optim.warmup_steps": 0}
    config = tiny_config(steps=3, **changes)
    train(config, tmp_path)
    state = restored(config, tmp_path).state
    assert int(state.skipped) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [row["skipped_steps"] for row in read_metrics(tmp_path) if "skipped_steps" in row] == [0, 1, 2]
