"""The generator goes through the training loop."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.inference.generator import Generator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import global_batch, make_mesh
from fvq_jax.tasks import task_of
from fvq_jax.tasks.generator.task import GeneratorTask
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.loop import train
from fvq_jax.training.metric_files import read_metrics
from fvq_jax.training.state import NetworkState, TrainState
from tests.helpers.code_folders import write_codes
from tests.helpers.same_bits import assert_same_bits
from tests.helpers.tiny import make_step
from tests.helpers.tiny_generator import (
    CLASSES,
    GRID,
    VOCAB,
    chain_codes,
    mesh_of,
    random_batch,
    tiny_config,
    write_splits,
)

STEPS = 4
QUICK = {"xla_backend_optimization_level": 0}  # to compile, and slower to run
CHANGES = {
    "steps": STEPS,
    "mesh.codebook": 2,
    "optim.ema_decay": 0.5,
    "optim.accumulate": 2,
    "eval.every_steps": 2,
    "log.every_steps": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def finished(folder):
    config = tiny_config(folder, **CHANGES)
    return folder / "run", train(task_of(config), config, folder / "run")


def restored(workdir, config):
    step = make_step(config, make_mesh(config.mesh.data, config.mesh.codebook), config.steps)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(step.abstract()).state


def test_it_trains_evaluates_logs_and_reports(finished):
    workdir, result = finished
    metrics = ["nll_bits", "unigram_bits", "bigram_bits", "nll", "nll_perplexity", "accuracy", "bits_per_pixel"]
    shown = ["step", *metrics, "images", "codes", "parameters", "images_per_second", "seconds", "workdir"]
    assert list(result.summary) == shown
    assert (result.summary["images"], result.summary["codes"]) == (24, 24 * 16)
    assert result.summary["bigram_bits"] < result.summary["unigram_bits"] < 6.1
    assert result.summary["bits_per_pixel"] == pytest.approx(result.summary["nll_bits"] / 16)
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "eval/nll_bits" in row] == [2, 4]
    logged = [row for row in rows if "loss/total" in row]
    assert logged[0]["loss/total"] == pytest.approx(np.log(VOCAB), rel=1e-5)  # the head is zero at first
    assert logged[-1]["loss/total"] < logged[0]["loss/total"]
    names = {"nll_bits", "accuracy", "usage/window", "tokens_per_second", "mfu", "grad_norm/generator"}
    assert names <= logged[0].keys()
    assert logged[-1]["tokens_per_second"] == pytest.approx(16 * logged[-1]["images_per_second"])
    assert logged[0]["tokens/window"] == 16 * 16
    assert "nll" in (workdir / "report" / "index.html").read_text()


def test_its_workdir_is_a_generator_that_knows_where_its_codes_come_from(finished, folder):
    workdir, result = finished
    assert json.loads((workdir / "provenance.json").read_text()) == {
        "tokenizer": "0123456789abcdef",
        "condition": "none",
        "image_size": 16,
        "class_names": [],
    }
    generator = Generator.from_pretrained(workdir)
    assert generator.provenance.tokenizer == "0123456789abcdef"
    source = GeneratorTask(tiny_config(folder), mesh_of(1, 1)).source("eval")
    codes = np.stack([source[i]["codes"][0, source.info.first_crop] for i in range(24)])
    labels = np.array([source[i]["label"] for i in range(24)])
    assert generator.nll_bits(labels, codes).mean() == pytest.approx(result.summary["nll_bits"], rel=1e-4)


@pytest.mark.slow
def test_stopped_and_started_again_it_gives_the_same_bits(finished, folder, tmp_path, monkeypatch):
    config = tiny_config(folder, **CHANGES)
    evaluate = GeneratorTask.evaluate

    def stop(self, state, progress=lambda done: None):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, state, progress)

    with monkeypatch.context() as patch:
        patch.setattr(GeneratorTask, "evaluate", stop)
        assert train(GeneratorTask, config, tmp_path).interrupted
    train(GeneratorTask, config, tmp_path)
    assert_same_bits(restored(tmp_path, config), restored(finished[0], config))


def test_an_evaluation_of_part_of_the_set(folder):
    config = tiny_config(folder, **{"eval.images": 10})
    task = GeneratorTask(config, make_mesh(-1, 1))
    step = make_step(config, make_mesh(-1, 1))
    seen = []
    found = task.evaluate(jax.jit(step.init)(jax.random.key(0)), seen.append)
    assert found.facts == {"images": 10, "codes": 160}
    assert sum(seen) == 10
    assert found.metrics["nll_bits"] == pytest.approx(6.0)
    assert re.match(r"6\.000 bits per code \(unigram .*, bigram .*\), .* of 160 codes were the likeliest", found.line)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Without anything that is dropped."""
    off = {"generator.dropout": 0.0, "generator.class_dropout": 0.0}
    mesh, found = mesh_of(1, 1), []
    for micro in (1, 4):
        step = make_step(tiny_config(**off, **{"optim.accumulate": micro}), mesh)
        state = jax.jit(step.init, compiler_options=QUICK)(jax.random.key(0))
        compiled = jax.jit(step.__call__, compiler_options=QUICK)
        _, metrics = compiled(state, global_batch(random_batch(16), mesh), {})
        found.append((metrics.scalars["grad_norm/generator"], metrics.scalars["loss/total"], metrics.counts["codes"]))
    for one, four in zip(*found, strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-5)


def test_matrices_decay_and_weights_of_norms_do_not():
    step = make_step(tiny_config(**{"optim.weight_decay": 0.5}), mesh_of(1, 1))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), step.abstract().networks["generator"].params)
    optimizer = step.optimizers["generator"]
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        assert np.any(update) != ("norm" in name), name
    still = make_step(tiny_config(**{"optim.weight_decay": 0.0}), mesh_of(1, 1)).optimizers["generator"]
    updates, _ = still.update(jax.tree.map(np.zeros_like, params), still.init(params), params)
    assert not any(np.any(update) for update in jax.tree.leaves(updates))


@pytest.mark.slow
def test_bfloat16_changes_the_products_only():
    mesh, found = mesh_of(1, 1), {}
    for dtype in ("float32", "bfloat16"):
        task, rng = GeneratorTask(tiny_config(**{"generator.dtype": dtype}), mesh), np.random.default_rng(0)

        def parameter(leaf, rng=rng):
            return jnp.asarray(rng.normal(0.0, 0.1, leaf.shape), jnp.float32)

        def compute(params, batch, task=task):
            state = TrainState(0, 0, {"generator": NetworkState(params, {}, {})}, {})
            gradients = task.gradients(state, batch, jax.random.key(1), {})
            return gradients.scalars["loss/total"], gradients.grads["generator"]

        params = jax.tree.map(parameter, jax.eval_shape(task.init, jax.random.key(0))["generator"]["params"])
        loss, grads = jax.jit(compute, compiler_options=QUICK)(params, global_batch(random_batch(8), mesh))
        assert {leaf.dtype for leaf in jax.tree.leaves((loss, grads))} == {np.dtype(np.float32)}
        found[dtype] = float(loss)
    assert found["float32"] != found["bfloat16"]
    assert found["float32"] == pytest.approx(found["bfloat16"], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator.grid": (2, 8)}, r"have the grid \(4, 4\), and generator.grid is \(2, 8\): set .*grid=4,4"),
        ({"generator.vocab": 128}, "vocabulary of 64, and generator.vocab is 128: set .*vocab=64"),
        ({"generator.classes": 3}, "have 4 classes, and generator.classes is 3: set .*classes=4"),
        ({"data.train_dir": "nowhere"}, "nowhere"),
    ],
)
def test_codes_that_do_not_fit_are_refused_before_anything_compiles(folder, tmp_path, changes, message):
    config = tiny_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        train(GeneratorTask, config, tmp_path / "run")


def test_codes_with_levels_are_refused(tmp_path):
    codes, labels = chain_codes(8, 0)
    for split in ("train", "eval"):
        write_codes(tmp_path / split, codes.reshape(8, 1, -1, 2, 2, 4), labels, vocab=64, classes=4, size=16)
    with pytest.raises(
        InputError, match=r"are \[2, 2, 4\], and a generator takes codes \[h, w\]: use a tokenizer whose"
    ):
        train(GeneratorTask, tiny_config(tmp_path), tmp_path / "run")


def test_splits_of_two_tokenizers_or_conditions_are_refused(folder, tmp_path):
    for change, message in (
        ({"tokenizer": "fedcba9876543210"}, "codes of the tokenizer 0123456789abcdef, .* codes of fedcba9876543210"),
        ({"condition": "label"}, "the condition 'none', and data.eval_dir with 'label'"),
    ):
        other = write_splits(tmp_path / next(iter(change)), **change)
        config = tiny_config(folder, **{"data.eval_dir": f"{other}/eval"})
        with pytest.raises(InputError, match=message):
            train(GeneratorTask, config, tmp_path / "run")


def test_codes_of_another_tokenizer_are_refused_naming_both(folder, tmp_path, monkeypatch):
    class Stand:
        fingerprint = "aaaabbbbccccdddd"

    monkeypatch.setattr(Tokenizer, "from_pretrained", lambda path: Stand)
    config = tiny_config(folder, **{"data.tokenizer": "some/tokenizer"})
    with pytest.raises(InputError, match=r"tokenizer 0123456789abcdef, and data\.tokenizer some/tokenizer is aaaabbbb"):
        train(GeneratorTask, config, tmp_path / "run")
    Stand.fingerprint = "0123456789abcdef"
    GeneratorTask(config, make_mesh(-1, 1)).open_files()


def test_a_run_starts_from_a_saved_generator_of_the_same_kind(finished, folder, tmp_path):
    Generator.from_pretrained(finished[0]).save_pretrained(tmp_path / "saved")
    for path in (finished[0], tmp_path / "saved"):
        params = GeneratorTask(tiny_config(folder), mesh_of(1, 1)).load(str(path))
        assert_same_bits(params, restored(finished[0], tiny_config(folder, **CHANGES)).ema)
    other = tiny_config(folder, **{"generator.layers": 3, "generator.heads": 2})
    with pytest.raises(InputError, match=r"generator\.layers is 2 there and 3 here; generator\.heads is 4 there"):
        GeneratorTask(other, mesh_of(1, 1)).load(str(tmp_path / "saved"))


def test_the_batches_are_those_of_the_step(folder):
    task = GeneratorTask(tiny_config(folder), make_mesh(-1, 1))
    batches, later = task.batches(0), task.batches(3)
    try:
        for _ in range(3):
            batch = next(batches)
            assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
                name: (leaf.shape, leaf.dtype) for name, leaf in task.batch_spec().items()
            }
        fourth = next(batches)
        for name, rows in next(later).items():
            np.testing.assert_array_equal(rows, fourth[name])
        assert fourth["label"].max() < CLASSES
        assert fourth["codes"].shape[1] == GRID[0] * GRID[1]
    finally:
        batches.close()
        later.close()
