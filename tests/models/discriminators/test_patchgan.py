import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fvq_jax.interop.discriminator import patchgan_from_torch
from fvq_jax.models.discriminators.patchgan import BatchNorm, PatchGAN
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import load_case, relative_error


@functools.cache
def golden():
    case = load_case("patchgan")
    return case, patchgan_from_torch(case.weights), PatchGAN(**case.config)


def test_train_logits_and_the_running_statistics_they_leave_equal_the_published_ones():
    case, variables, model = golden()
    logits, updates = model.apply(variables, case.images(), train=True, mutable=["batch_stats"])
    assert relative_error(logits.transpose(0, 3, 1, 2), case.outputs["logits_train"]) < 1e-4
    for layer in (1, 2, 3):
        stats = updates["batch_stats"][f"norm_{layer}"]
        assert relative_error(stats["mean"], case.outputs[f"after/main.{3 * layer}.running_mean"]) < 1e-4
        assert relative_error(stats["var"], case.outputs[f"after/main.{3 * layer}.running_var"]) < 1e-4


def test_eval_logits_use_the_running_statistics_and_equal_the_published_ones():
    case, _, model = golden()
    after = patchgan_from_torch(case.weights | {k[6:]: v for k, v in case.outputs.items() if k.startswith("after/")})
    logits = model.apply(after, case.images(), train=False)
    assert relative_error(logits.transpose(0, 3, 1, 2), case.outputs["logits_eval"]) < 1e-4
    one_by_one = model.apply(after, case.images()[:1], train=False)
    np.testing.assert_allclose(one_by_one, logits[:1], atol=1e-5)


def test_logits_alone_can_be_asked_for_in_train_mode():
    case, variables, model = golden()
    both, _ = model.apply(variables, case.images(), train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(model.apply(variables, case.images(), train=True), both)


def test_statistics_over_a_sharded_batch_are_those_of_the_whole_batch():
    _, variables, model = golden()
    images = np.random.default_rng(0).uniform(-1, 1, (8, 32, 32, 3)).astype(np.float32)
    images *= np.arange(1, 9, dtype=np.float32)[:, None, None, None] / 8  # every shard has other statistics

    @jax.jit
    def loss_and_stats(params, images):
        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(logits)), updates

        return jax.value_and_grad(loss, has_aux=True)(params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(variables["params"], NamedSharding(mesh, PartitionSpec()))
    expected = loss_and_stats(variables["params"], images)
    actual = loss_and_stats(replicated, sharded)
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < 1e-4


@pytest.mark.slow
def test_bfloat16_keeps_statistics_parameters_and_logits_in_float32():
    case, variables, _ = golden()
    model = PatchGAN(**case.config, dtype=jnp.bfloat16)
    logits, updates = model.apply(variables, case.images(), train=True, mutable=["batch_stats"])
    initial = model.init(jax.random.key(0), case.images(), train=True)
    assert {x.dtype for x in jax.tree.leaves((logits, updates, initial))} == {jnp.dtype(jnp.float32)}
    error = relative_error(logits.transpose(0, 3, 1, 2), case.outputs["logits_train"])
    assert 1e-4 < error < 0.1


def test_bfloat16_sums_run_in_float32():
    x = 100 + jax.random.normal(jax.random.key(0), (4, 16, 16, 2))  # in bfloat16 neighbours of 100 are 0.5 apart
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=True)
    _, updates = norm.apply(variables, x.astype(jnp.bfloat16), train=True, mutable=["batch_stats"])
    seen = np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)).reshape(-1, 2)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * seen.var(0, ddof=1), rtol=1e-5)


def test_a_fresh_network_starts_as_published():
    variables = jax.jit(lambda: PatchGAN(ndf=32).init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)), train=True))()
    params = variables["params"]
    assert np.std(params["conv_2"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.mean(params["norm_3"]["scale"]) == pytest.approx(1, abs=0.01)
    assert np.std(params["norm_3"]["scale"]) == pytest.approx(0.02, rel=0.2)
    assert not any(np.any(layer["bias"]) for layer in params.values() if "bias" in layer)
    assert not np.any(variables["batch_stats"]["norm_1"]["mean"])
    assert np.all(variables["batch_stats"]["norm_1"]["var"] == 1)


@pytest.mark.parametrize(("n_layers", "side", "widths"), [(1, 32, [8, 16]), (4, 48, [8, 16, 32, 64, 64])])
def test_depth_and_width_follow_the_options(n_layers, side, widths):
    model = PatchGAN(ndf=8, n_layers=n_layers)
    images = jnp.zeros((2, side, side, 3))
    logits, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    assert logits.shape == (2, side // 2**n_layers - 2, side // 2**n_layers - 2, 1)
    kernels = [variables["params"][f"conv_{i}"]["kernel"].shape[-1] for i in range(n_layers + 1)]
    assert kernels == widths


def test_images_too_small_for_a_logit_are_refused():
    model = PatchGAN()
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)), train=False))
    with pytest.raises(ValueError, match="at least 24 pixels, got 24x23"):
        model.init(jax.random.key(0), jnp.zeros((1, 24, 23, 3)), train=False)


def test_missing_tensors_are_named():
    case, _, _ = golden()
    without = {k: v for k, v in case.weights.items() if k != "main.6.running_var"}
    with pytest.raises(InputError, match=r"lacks main\.6\.running_var \(of 19 needed"):
        patchgan_from_torch(without)
    with pytest.raises(InputError, match="no BatchNorm"):
        patchgan_from_torch({})
