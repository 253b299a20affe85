"""Whole runs of a tokenizer: what the loop and the task make together."""

import functools
import json
import os
import shutil
import signal
import threading

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fvq_jax import evaluate
from fvq_jax.data import pipeline
from fvq_jax.data.prefetch import Prefetch
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.tasks import task_of
from fvq_jax.training import loop
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.metric_files import read_metrics
from tests.helpers.same_bits import assert_same_bits
from tests.helpers.tiny import make_step, random_images, tiny_config

pytestmark = pytest.mark.usefixtures("no_drawing")

# Everything that has a state: discriminator, moving average, a rate of its own for the codebook.
WHOLE = {
    "tokenizer.ch_mult": (1,),
    "tokenizer.z_channels": 16,
    "adversarial.weight": 0.5,
    "adversarial.start": 2,
    "optim.ema_decay": 0.9,
    "optim.codebook_learning_rate": 2e-3,
    "checkpoint.every_steps": 2,
    "log.every_steps": 1,
}


def train(config, workdir, **options):
    return loop.train(task_of(config), config, workdir, **options)


@functools.cache
def layout():
    return make_step(tiny_config(**WHOLE), make_mesh(-1, 1), 4, 1).abstract()


def restored(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(layout())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps that nothing disturbed: its workdir and its result."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(tiny_config(**WHOLE), workdir, profile_steps=(2, 3))


def interrupt_before_step(monkeypatch, step):
    """SIGTERM arrives while the loop fetches the batch of this step (counted from 0 in this call of `train`)."""
    fetched = {"batches": 0}

    def counted(original):
        def fetch(self):
            if threading.current_thread() is threading.main_thread():  # others fetch ahead
                if fetched["batches"] == step:
                    os.kill(os.getpid(), signal.SIGTERM)
                fetched["batches"] += 1
            return original(self)

        return fetch

    for kind in (Prefetch, pipeline.Batches):
        monkeypatch.setattr(kind, "__next__", counted(kind.__next__))


@pytest.mark.slow
def test_stopped_by_a_signal_it_saves_the_last_step(tmp_path, monkeypatch):
    """After step 3, when a checkpoint is a step old."""
    with monkeypatch.context() as patch:
        interrupt_before_step(patch, 3)
        assert train(tiny_config(**WHOLE), tmp_path).interrupted
    assert int(restored(tmp_path).state.step) == 3


@pytest.mark.slow
def test_from_a_checkpoint_it_goes_on_to_the_weights_of_never_stopping(finished, tmp_path):
    for name in ("config.json", "metrics.jsonl", "checkpoints/step_2"):
        copy = shutil.copytree if (finished[0] / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(finished[0] / name, tmp_path / name)
    result = train(tiny_config(**WHOLE), tmp_path)
    assert not result.interrupted
    ours, theirs = restored(tmp_path), restored(finished[0])
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


def test_result_and_files_of_a_run(finished):
    workdir, result = finished
    summary = result.summary
    assert summary["step"] == 4
    assert summary["codebook_size"] == 64
    assert summary["images"] == 24
    assert summary["tokens"] == 24 * 16 * 16
    assert 0 < summary["usage"] <= 1
    assert 1 <= summary["perplexity"] <= 64
    windows = [row["tokens/window"] for row in read_metrics(workdir) if "tokens/window" in row]
    assert windows == [16 * 256] * 4  # it logs at every step
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
    record = restored(workdir).record
    assert record["config"]["optim"]["ema_decay"] == 0.9


def test_what_a_run_leaves_for_those_who_watch_it(finished):
    workdir = finished[0]
    heartbeat = json.loads((workdir / "heartbeat" / "host_000.json").read_text())
    assert (heartbeat["step"], heartbeat["phase"]) == (4, "done")
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    rows = [row for row in read_metrics(workdir) if "goodput" in row]
    assert all(0 < row["goodput"] < 1 for row in rows)
    assert all(row["time/longest_silence"] > 0 for row in rows)


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
    assert (metrics["images"], metrics["tokens"], metrics["size"]) == (24, 24 * 256, 16)
    for name in ("psnr", "ssim", "l1", "mse", "usage", "perplexity"):
        assert metrics[name] == pytest.approx(result.summary[name], rel=1e-4), name
    assert "Codes used while training" in (tmp_path / "report" / "index.html").read_text()


def test_evaluation_uses_the_moving_average(finished):
    config = tiny_config(**WHOLE)
    state = restored(finished[0]).state
    task = make_step(config, make_mesh(-1, 1)).task
    scored = task.scored_variables(state)
    assert scored.keys() == {"params"}
    assert_same_bits(scored["params"], state.ema)
    with pytest.raises(AssertionError):
        assert_same_bits(state.ema["encoder"], state.networks["tokenizer"].params["encoder"])


def test_another_model_or_data_does_not_continue(finished):
    for name, value in {"tokenizer.quantizer.bridge": "none", "data.flip": False, "seed": 1}.items():
        with pytest.raises(InputError, match=f"{name}: .* -> "):
            train(tiny_config(**WHOLE, **{name: value}), finished[0])


def test_a_lost_config_file_does_not_let_another_run_in(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(InputError, match="seed: 0 -> 7"):
        train(tiny_config(**WHOLE, seed=7), tmp_path / "copy")


@pytest.mark.slow
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
