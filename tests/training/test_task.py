"""A second task (tests/helpers/regression.py) goes through the whole loop, which therefore knows no task."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from fvq_jax.config.checks import all_fields, validate
from fvq_jax.config.explain import explain
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.tasks import TASKS, default_config, task_of
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.loop import train
from fvq_jax.training.metric_files import read_metrics
from fvq_jax.training.step import TrainStep
from fvq_jax.training.step_plan import make_plan, plan_config
from tests.helpers.import_graph import ROOT
from tests.helpers.regression import RegressionTask, regression_config
from tests.helpers.same_bits import assert_same_bits

# Runs the program with the second task registered; kills itself where it is told to.
PROGRAM = """
import os, signal, sys
from absl import app
from fvq_jax.tasks import TASKS, default_config
from fvq_jax.training.loop import train
from tests.helpers.regression import RegressionTask, VectorBatches, regression_config

TASKS["regression"] = RegressionTask
kill_at, workdir = int(sys.argv[1]), sys.argv[2]
following = VectorBatches.__next__

def counted(self):
    batch = following(self)
    self.made = getattr(self, "made", 0) + 1
    if self.made == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch

VectorBatches.__next__ = counted
train(RegressionTask, regression_config(), workdir)
"""


def restored(workdir, config=None):
    config = config or regression_config()
    mesh = make_mesh(config.mesh.data, config.mesh.codebook)
    step = TrainStep.of(RegressionTask(config, mesh), config, mesh, config.steps, 1)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(step.abstract()).state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(task_of(regression_config()), regression_config(), workdir)


def test_it_trains_evaluates_logs_and_reports(finished):
    workdir, result = finished
    assert list(result.summary) == [
        *("step", "error", "vectors", "parameters", "vectors_per_second", "seconds", "workdir"),
    ]
    assert result.summary["parameters"] == 8 * 16 + 16 + 16 + 1
    assert result.summary["vectors"] == 32
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "eval/error" in row] == [3, 6]
    logged = [row for row in rows if "loss/total" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert {"positive/batch", "positive/window", "vectors_per_second", "grad_norm/regressor"} <= logged[0].keys()
    assert logged[-1]["loss/total"] < logged[0]["loss/total"]
    assert json.loads((workdir / "report.json").read_text()) == {"error": result.summary["error"], "rows": len(rows)}


def test_its_state_changes_in_training_and_not_in_an_evaluation(finished, tmp_path):
    mean = restored(finished[0]).networks["regressor"].variables["running"]["mean"]
    assert np.abs(np.asarray(mean)).min() > 0.1
    config = regression_config(**{"eval.every_steps": 1})
    train(RegressionTask, config, tmp_path)
    assert_same_bits(restored(tmp_path), restored(finished[0]))


def test_killed_and_started_again_it_gives_the_same_bits(finished, tmp_path):
    """Killed while it prepares the batch after next, so within a step or two of step 3; then run to the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, "6", str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = [row["step"] for row in read_metrics(tmp_path) if "loss/total" in row]
    assert 0 < len(steps) < 6
    train(RegressionTask, regression_config(), tmp_path)
    assert_same_bits(restored(tmp_path), restored(finished[0]))


def test_every_step_and_micro_batch_drops_other_units():
    """With the same batch and parameters: what differs between two losses is the dropout key."""
    config = regression_config(**{"optim.accumulate": 1})
    mesh = make_mesh(-1, 1)
    step = TrainStep.of(RegressionTask(config, mesh), config, mesh, 6, 1)
    state = jax.jit(step.init)(jax.random.key(0))
    x = np.tile(np.linspace(-1, 2, 8, dtype=np.float32), (16, 1))
    batch = {"x": x, "y": np.square(x).sum(axis=1)}

    def losses(step, state):
        found = jax.jit(step.__call__)(state, batch, {})[1].scalars
        return float(found["loss/total"])

    first, later = losses(step, state), losses(step, state.replace(step=state.step + 1))
    assert first == losses(step, state)
    assert first != later
    assert first != losses(dataclasses.replace(step, seed=1), state)
    split = dataclasses.replace(step, accumulate=2)  # the same key twice would drop the same units twice
    assert losses(split, state) not in (first, later)


def test_weight_decay_moves_matrices_only():
    config = regression_config(**{"optim.weight_decay": 0.5, "optim.warmup_steps": 0})
    task = RegressionTask(config, make_mesh(-1, 1))
    step = TrainStep.of(task, config, make_mesh(-1, 1), 6, 1)
    params = jax.tree.map(lambda leaf: leaf + 1, step.init(jax.random.key(0)).networks["regressor"].params)
    optimizer = step.optimizers["regressor"]
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert np.abs(updates["hidden"]["kernel"]).min() > 0
    assert not np.any(updates["hidden"]["bias"])


def test_its_step_is_planned():
    config = plan_config(RegressionTask, regression_config(), 8)
    plan = make_plan(RegressionTask, config, jax.devices())
    assert plan.fits
    assert plan.bytes["batch"] == 16 // 8 * (8 + 1) * 4
    parameters = 8 * 16 + 16 + 16 + 1
    assert plan.bytes["parameters"] == 4 * (2 * parameters + 8)  # with the moving average, and the running mean
    assert plan.flops_per_device > 0


def test_another_model_does_not_continue(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    with pytest.raises(InputError, match=r"regressor\.width: 16 -> 32"):
        train(RegressionTask, regression_config(**{"regressor.width": 32}), workdir)
    train(RegressionTask, regression_config(**{"regressor.dropout": 0.1, "steps": 7}), workdir)
    with pytest.raises(InputError, match="task: 'regression' -> 'tokenizer'"):
        train(TASKS["tokenizer"], default_config(), workdir)


def test_it_starts_from_what_it_loads(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"hidden/kernel": (8, 16), "hidden/bias": (16,), "out/kernel": (16, 1), "out/bias": (1,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "weights.npz", **weights)
    config = regression_config(
        **{
            "init_from": str(tmp_path / "weights.npz"),
            "steps": 2,
            "optim.learning_rate": 1e-30,
            "optim.warmup_steps": 0,
        }
    )
    train(RegressionTask, config, tmp_path / "run")
    kernel = restored(tmp_path / "run", config).networks["regressor"].params["hidden"]["kernel"]
    np.testing.assert_allclose(kernel, weights["hidden/kernel"], rtol=1e-6)


def test_its_fields_are_checked_and_explained():
    config = regression_config()
    validate(config, task_of(config), 8)
    config.regressor.dropout = 1.5
    with pytest.raises(InputError, match=r"regressor\.dropout must be below 1"):
        validate(config, task_of(config), 8)
    assert "Share of hidden units that are dropped." in explain(config, all_fields(RegressionTask, config))
