"""The same losses and gradients on every mesh."""

import functools

import jax
import numpy as np
import pytest

from fvq_jax.runtime.mesh import global_batch, shardings
from fvq_jax.runtime.names import path_name
from fvq_jax.tasks.generator.task import GeneratorTask
from fvq_jax.training.state import RULES, NetworkState, TrainState
from tests.helpers.slow_cases import slow
from tests.helpers.tiny_generator import mesh_of, random_batch, tiny_config

IMAGES = 16


@functools.cache
def results(data, codebook, dropout=0.1):
    """(gradients, scalars, counts) as numpy arrays, computed on that mesh, with a head that is not zero."""
    mesh = mesh_of(data, codebook)
    config = tiny_config(**{"generator.dropout": dropout, "generator.class_dropout": 0.0})
    task = GeneratorTask(config, mesh)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))["generator"]["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.1, leaf.shape).astype(np.float32), shapes)
    step = np.zeros((), np.int32)
    state = TrainState(step, step, {"generator": NetworkState(params, {}, {})}, {})

    def compute(state, batch):
        found = task.gradients(state, batch, jax.random.key(0), {})
        return found.grads["generator"], found.scalars, found.counts

    compiled = jax.jit(compute, compiler_options={"xla_backend_optimization_level": 0})
    placed = jax.device_put(state, shardings(state, mesh, (*RULES, *task.rules)))
    return jax.tree.map(np.asarray, compiled(placed, global_batch(random_batch(IMAGES), mesh)))


def test_the_comparison_is_worth_making():
    """Every parameter has a gradient, and some codes are guessed."""
    gradients, scalars, counts = results(1, 1)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert set(scalars) == {"loss/total", "nll_bits", "accuracy"}
    assert scalars["nll_bits"] == pytest.approx(scalars["loss/total"] / np.log(2))
    assert scalars["accuracy"] > 0
    np.testing.assert_array_equal(counts["codes"], np.bincount(random_batch(IMAGES)["codes"].reshape(-1), minlength=64))


def test_dropout_follows_the_key_of_the_micro_batch():
    assert results(1, 1)[1]["loss/total"] != results(1, 1, dropout=0.0)[1]["loss/total"]


@pytest.mark.parametrize("sizes", [(2, 4), *slow((8, 1), (1, 8))])
def test_losses_and_gradients_are_those_of_one_device(sizes):
    gradients, scalars, counts = results(1, 1)
    our_gradients, our_scalars, our_counts = results(*sizes)
    np.testing.assert_array_equal(our_counts["codes"], counts["codes"])
    for name, value in scalars.items():
        np.testing.assert_allclose(our_scalars[name], value, rtol=1e-5, err_msg=name)
    for (path, theirs), ours in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(our_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=path_name(path))
