"""The same losses, gradients and codes on every mesh."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from fvq_jax.ops.pixels import to_float
from fvq_jax.runtime.mesh import global_batch, shardings
from fvq_jax.runtime.names import path_name
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.state import RULES, NetworkState, TrainState
from tests.helpers.random_tokenizer import random_params
from tests.helpers.slow_cases import slow
from tests.helpers.tiny import tiny_config

CODES, IMAGES = 256, 16
CONFIG = {
    "tokenizer.ch": 64,  # two channels to a group: with one, a bias before a norm has no gradient
    "tokenizer.ch_mult": (1,),
    "tokenizer.quantizer.codebook_size": CODES,
    "tokenizer.quantizer.code_dim": 4,
    "tokenizer.quantizer.bridge": "XS/2-d1",  # 8 rows of patches: enough for an axis of 8
    "tokenizer.quantizer.entropy_weight": 0.1,
    "tokenizer.quantizer.entropy_temperature": 0.1,
    "data.image_size": 8,
}


@functools.cache
def results(data, codebook):
    """(gradients, loss terms, codes, latents, bridged codebook) as numpy arrays, computed on that mesh."""
    devices = jax.devices()[: data * codebook]
    mesh = jax.make_mesh((data, codebook), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    config = tiny_config(**CONFIG)
    task = TokenizerTask(config, mesh)
    # Random weights of every kind: spread codes, and a last bridge layer that is not zero.
    params = random_params(task.net.clone(quantizer=task.net.quantizer.clone(mesh=None)))
    step = np.zeros((), np.int32)
    state = TrainState(step, step, {"tokenizer": NetworkState(params, {}, {})}, {})
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)

    def compute(state, images):
        found = task.gradients(state, {"image": images}, jax.random.key(0), {})
        variables = {"params": state.networks["tokenizer"].params}
        latents = task.net.apply(variables, to_float(images), method="encode_latent")
        table = task.net.apply(variables, method="table")
        codes = task.net.apply(variables, to_float(images), method="encode")
        return found.grads["tokenizer"], found.scalars, codes, latents, table

    # Machine code that is hardly optimised compiles in half the time; how the work is divided stays the same.
    compiled = jax.jit(compute, compiler_options={"xla_backend_optimization_level": 0})
    images = global_batch({"image": pixels}, mesh)["image"]
    return jax.tree.map(
        np.asarray, compiled(jax.device_put(state, shardings(state, mesh, (*RULES, *task.rules))), images)
    )


@pytest.mark.slow
def test_the_comparison_is_worth_making():
    """Over a quarter of the codes are hit, none is as near as another, and every code has a gradient."""
    gradients, terms, codes, latents, table = results(1, 1)
    assert len(np.unique(codes)) > CODES / 4
    z, e = latents.reshape(-1, latents.shape[-1]).astype(np.float64), table.astype(np.float64)
    first, second = np.sort(np.square(z[:, None] - e[None]).sum(axis=2), axis=1)[:, :2].T
    rounding = 2e-6 * (np.square(z).sum(axis=1) + np.square(e).sum(axis=1).max())
    assert (second - first > rounding).all()
    losses = {f"loss/{name}" for name in ("codebook", "commitment", "entropy", "reconstruction", "total")}
    assert set(terms) == losses | {"quantization/error", "quantization/relative_error"}
    assert np.any(gradients["quantizer"]["codebook"], axis=1).all()


@pytest.mark.parametrize("sizes", [(2, 4), *slow((8, 1), (1, 8))])
def test_losses_gradients_and_codes_are_those_of_one_device(sizes):
    gradients, terms, codes, *_ = results(1, 1)
    our_gradients, our_terms, our_codes, *_ = results(*sizes)
    np.testing.assert_array_equal(our_codes, codes)
    for name, value in terms.items():
        np.testing.assert_allclose(our_terms[name], value, rtol=1e-5, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    for (path, theirs), ours in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(our_gradients), strict=True):
        name, scale = path_name(path), np.abs(theirs).max()
        if name.endswith("/k/conv/bias"):  # exactly 0, as a softmax does not see a shift: what is left is rounding
            assert scale < 1e-6 * largest, name
            scale = largest
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale, err_msg=name)
