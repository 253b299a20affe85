import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.ops.entropy import entropy_loss
from fvq_jax.ops.nearest import nearest_code
from fvq_jax.ops.vectors import l2_normalize
from fvq_jax.runtime.mesh import shardings
from tests.helpers.golden_case import relative_error
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny import spread_codes

K, D = 64, 8
WEIGHTS = np.random.default_rng(9).normal(size=(8, 2, 3, D)).astype(np.float32)


def bridged(params):
    return jax.jit(lambda params: make().apply({"params": params}, method="table"))(params)


def make(**options):
    return VectorQuantizer(**{"codebook_size": K, "code_dim": D, "bridge": "XS/2-d1", **options})


@functools.cache
def latents_and_params():
    rng = np.random.default_rng(0)
    params = jax.jit(make().init)(jax.random.key(0), jnp.zeros((8, 2, 3, D)))["params"]
    params = spread_codes({"quantizer": params})["quantizer"]
    table = bridged(params)
    # Around the codes, wherever those are, so that many of them are hit; scaled, so that directions differ.
    latent = table[rng.permutation(K)[:48]] * rng.uniform(0.3, 2, (48, 1)) + 0.05 * rng.normal(size=(48, D))
    return latent.reshape(8, 2, 3, D).astype(jnp.float32), params


@functools.cache
def results(mesh=None, **options):
    """(output, gradients to latents and parameters) of a loss that weighs every part."""
    quantizer = make(mesh=mesh, **options)

    def loss(latent, params):
        output = quantizer.apply({"params": params}, latent)
        terms = {name: weight * output.losses[name] for name, weight in quantizer.loss_weights.items()}
        return sum(terms.values()) + jnp.sum(WEIGHTS * output.vectors), output

    gradients, output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*placed(mesh))
    return output, gradients


def placed(mesh):
    latent, params = latents_and_params()
    if mesh is None:
        return latent, params
    layout = shardings(params, mesh, VectorQuantizer.rules)
    return jax.device_put(latent, NamedSharding(mesh, P(("data", "codebook")))), jax.device_put(params, layout)


def mesh_of(data, codebook):
    return jax.make_mesh((data, codebook), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("sizes", MESHES)
def test_on_a_mesh_codes_losses_and_gradients_are_those_of_one_device(sizes):
    expected, expected_gradients = results()
    assert len(np.unique(expected.codes)) > K / 4
    output, gradients = results(mesh_of(*sizes))
    np.testing.assert_array_equal(output.codes, expected.codes)
    np.testing.assert_allclose(output.vectors, expected.vectors, atol=1e-5)
    assert list(output.losses) == ["codebook", "commitment"]
    for name, loss in output.losses.items():
        np.testing.assert_allclose(loss, expected.losses[name], rtol=1e-5)
    errors = jax.tree.map(relative_error, gradients, expected_gradients)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_output_is_the_nearest_bridged_code():
    latent, params = latents_and_params()
    output, _ = results()
    table = bridged(params)
    codes = nearest_code(latent.reshape(-1, D), table)
    assert output.codes.shape == (8, 2, 3)
    assert output.codes.dtype == jnp.int32
    np.testing.assert_array_equal(output.codes.ravel(), codes)
    np.testing.assert_allclose(output.vectors.reshape(-1, D), table[codes], atol=1e-6)
    error = np.mean(np.square(latent.reshape(-1, D) - table[codes]))
    np.testing.assert_allclose(list(output.losses.values()), error, rtol=1e-5)
    np.testing.assert_array_equal(make().apply({"params": params}, latent, method="encode"), output.codes)
    looked_up = make().apply({"params": params}, output.codes, method="decode")
    np.testing.assert_allclose(looked_up.reshape(-1, D), table[codes], atol=1e-6)


def test_straight_through_reaches_the_latents_and_codebook_loss_the_bridge():
    latent, _ = latents_and_params()
    output, (to_latent, to_params) = results()
    pull = 0.25 * 2 * (latent - output.vectors) / latent.size
    np.testing.assert_allclose(to_latent, WEIGHTS + pull, atol=1e-5)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(to_params))


@pytest.mark.parametrize("sizes", [None, (2, 4)])
def test_l2_normalize_searches_and_returns_directions(sizes):
    latent, params = latents_and_params()
    options = {"l2_normalize": True}
    output, gradients = results(None if sizes is None else mesh_of(*sizes), **options)
    table = bridged(params)
    codes = nearest_code(latent.reshape(-1, D), table, l2_normalize=True)
    np.testing.assert_array_equal(output.codes.ravel(), codes)
    assert np.any(np.asarray(output.codes) != np.asarray(results()[0].codes))
    np.testing.assert_allclose(np.linalg.norm(output.vectors, axis=-1), 1, rtol=1e-5)
    difference = l2_normalize(latent).reshape(-1, D) - l2_normalize(table)[codes]
    np.testing.assert_allclose(output.losses["commitment"], np.mean(np.square(difference)), rtol=1e-4)
    errors = jax.tree.map(relative_error, gradients, results(**options)[1])
    assert max(jax.tree.leaves(errors)) < 1e-4


@pytest.mark.parametrize(
    ("sizes", "normalize"), [(None, False), pytest.param(None, True, marks=pytest.mark.slow), ((2, 4), True)]
)
def test_entropy_term(sizes, normalize):
    latent, params = latents_and_params()
    options = {"entropy_weight": 0.1, "entropy_temperature": 0.5, "l2_normalize": normalize}
    output, gradients = results(None if sizes is None else mesh_of(*sizes), **options)
    table = bridged(params)
    if normalize:
        latent, table = l2_normalize(latent), l2_normalize(table)
    expected = entropy_loss(latent.reshape(-1, D), table, temperature=0.5)
    np.testing.assert_allclose(output.losses["entropy"], expected, rtol=1e-4)
    without = results(l2_normalize=normalize)[1]
    assert relative_error(gradients[0], without[0]) > 1e-5
    errors = jax.tree.map(relative_error, gradients, results(**options)[1])
    assert max(jax.tree.leaves(errors)) < 1e-4


def test_without_a_weight_the_entropy_term_is_left_out_and_costs_nothing():
    assert "entropy" not in results()[0].losses
    latent, params = latents_and_params()

    def exponentials(**options):
        program = jax.make_jaxpr(lambda z: make(bridge="none", **options).apply({"params": params}, z))(latent)
        return str(program).count("log")

    assert exponentials() == 0
    assert exponentials(entropy_weight=0.1) > 0


@pytest.mark.parametrize("sizes", [None, (2, 4)])
def test_search_options_reach_the_search(sizes):
    latent, params = placed(mesh := None if sizes is None else mesh_of(*sizes))

    def lowered(platform="cpu", **options):
        apply = jax.jit(lambda latent, params: make(mesh=mesh, **options).apply({"params": params}, latent))
        return apply.trace(latent, params).lower(lowering_platforms=(platform,)).as_text()

    assert "bf16" in lowered(search_precision="bf16")
    assert "bf16" not in lowered()
    assert "tpu_custom_call" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("tpu", search_implementation="xla")


def test_a_fresh_codebook_is_uniform_within_one_over_k():
    params = make(bridge="none").init(jax.random.key(1), jnp.zeros((1, 1, 1, D)))["params"]
    codebook = params["codebook"]
    assert list(params) == ["codebook"]
    assert np.abs(codebook).max() <= 1 / K
    assert np.abs(codebook).max() > 0.98 / K
    np.testing.assert_allclose(np.std(codebook), 2 / K / np.sqrt(12), rtol=0.1)


def test_a_fresh_codebook_may_be_normal():
    codebook = make(bridge="none", init_std=0.1).init(jax.random.key(1), jnp.zeros((1, 1, 1, D)))["params"]["codebook"]
    np.testing.assert_allclose(np.std(codebook), 0.1, rtol=0.1)
    assert np.abs(codebook).max() > 0.2


def test_it_is_described_by_its_sizes_bridge_and_shapes():
    quantizer = make(l2_normalize=True)
    assert (quantizer.size, quantizer.latent_dim, quantizer.code_shape(2, 3)) == (K, D, (2, 3))
    assert quantizer.description == "bridge XS/2-d1, unit-length codes"
    assert make(bridge="none").architecture() == {
        **{"codebook_size": K, "code_dim": D, "bridge": "none", "l2_normalize": False},
    }
    assert "bridge_groups" in quantizer.architecture()
    counts = quantizer.counts(jnp.array([[[0, 1, 1]]]))
    np.testing.assert_array_equal(counts[0, :3], [1, 2, 0])
    assert counts.shape == (1, K)


def test_decoding_only_some_levels_is_refused_since_there_is_one():
    latent, params = latents_and_params()
    codes = jnp.zeros(latent.shape[:-1], jnp.int32)
    with pytest.raises(ValueError, match="single level"):
        make().apply({"params": params}, codes, 1, method="decode")


@pytest.mark.parametrize(
    ("options", "axis", "message"),
    [
        ({"bridge": "M/4"}, 1, "unknown bridge 'M/4'"),
        ({"codebook_size": 60}, 1, "codebook_size 60 does not fit bridge XS/2-d1 .*use 36 or 64 codes"),
        ({"codebook_size": 62, "bridge_groups": "1d"}, 1, "use 60 or 64 codes"),
        ({}, 8, "mesh.codebook 8 does not divide the 4 rows of groups .*allowed sizes: 1, 2, 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_would(options, axis, message):
    with pytest.raises(ValueError, match=message):
        make(**options).check(axis)
    make().check(4)


@pytest.mark.parametrize(("implementation", "platform"), [("auto", "tpu"), ("auto", "cpu"), ("xla", "tpu")])
def test_flops_that_are_not_counted(implementation, platform):
    """Of a kernel all of the search, on a CPU all blocks of 64 codes but two, of the scan all of 512 but two."""
    quantizer = make(codebook_size=4096, search_implementation=implementation, search_precision="bf16_3x")
    flops, passes = quantizer.uncounted_flops(100, platform)
    share = {("auto", "tpu"): 1, ("auto", "cpu"): 62 / 64, ("xla", "tpu"): 6 / 8}[implementation, platform]
    assert flops == pytest.approx(2 * 100 * 4096 * D * share)
    assert passes == (1 if platform == "cpu" else 3)


def test_a_condition_needs_a_bridge_with_classes():
    assert (make().classes, make(bridge="none").classes, make(bridge="dit-XS/2-c4").classes) == (0, 0, 4)
    assert make(bridge="dit-XS/2-c4").folded().classes == 0
    _, params = latents_and_params()
    with pytest.raises(ValueError, match=r"^bridge XS/2-d1 has no classes: leave condition out"):
        make().apply({"params": params}, 1, method="table")


@pytest.mark.parametrize("window", [1, 2])
def test_the_region_loss_pulls_codes_that_were_not_chosen_for_a_number_of_steps(window):
    """Code 0 is chosen first, then code 2 only; all other codes were never chosen."""
    table = np.float32([[0, 0], [1, 0], [5, 0], [6, 0], [7, 0], [50, 0]])
    quantizer = VectorQuantizer(codebook_size=6, code_dim=2, bridge="none", region_window=window)
    variables = {"params": {"codebook": jnp.asarray(table)}, "region": {"age": jnp.full(6, window, jnp.int32)}}
    first, second = (jnp.tile(jnp.array([[at, 1.0]]), (4, 1)).reshape(1, 2, 2, 2) for at in (0.0, 5.0))
    _, state = quantizer.apply(variables, first, train=True, mutable=["region"])
    np.testing.assert_array_equal(state["region"]["age"], [0] + [window] * 5)

    def loss(codebook):
        output, after = quantizer.apply(
            {"params": {"codebook": codebook}, **state}, second, train=True, mutable=["region"]
        )
        assert list(output.losses) == ["commitment", "region"]
        return output.losses["region"], after

    gradient, after = jax.grad(loss, has_aux=True)(jnp.asarray(table))
    np.testing.assert_array_equal(after["region"]["age"], [min(1, window), window, 0, window, window, window])
    pulled = np.array([window == 1, True, True, True, True, True])
    target = np.float32([5, 1])  # the mean of the latents that chose code 2
    np.testing.assert_allclose(gradient, 2 * (table - target) * pulled[:, None] / pulled.sum(), rtol=1e-5)
    assert dict(quantizer.loss_weights) == {"region": 1.0, "commitment": 0.25}
