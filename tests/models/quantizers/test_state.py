"""Quantizers with state: what a step does to it, the same on every mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.models.tokenizer import TokenizerNet, fold
from fvq_jax.ops import nearest_cpu
from fvq_jax.runtime.mesh import BATCH, shardings
from tests.helpers.compiled_program import arrays, collectives, size
from tests.helpers.golden_case import relative_error
from tests.helpers.quantizer_case import vector_weights
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of

K, D, STEPS = 64, 4, 3
KINDS = {
    "ema": {"decay": 0.8, "restart_below": 0.3},
    "simvq": {"estimator": "dynamic"},
    "vector": {"bridge": "linear", "init_std": 1.0, "region_window": 2, "estimator": "dynamic"},
    "restart": {"name": "vector", "bridge": "XS/2", "restart_after": 1.5, "estimator": "dynamic"},
}
COLLECTIONS = {"ema": "moving", "simvq": "fixed", "vector": "region", "restart": "placement"}
every = pytest.mark.parametrize("name", KINDS)


def make(name, mesh=None, **options):
    return make_quantizer({"name": name, "codebook_size": K, "code_dim": D, **KINDS[name], **options}, mesh=mesh)


def latents(step):
    """Near some places only, so that many codes are not chosen."""
    rng = np.random.default_rng(step)
    places = np.random.default_rng(7).normal(size=(9, D))
    return jnp.asarray(places[rng.integers(0, 9, (8, 4, 3))] + 0.3 * rng.normal(size=(8, 4, 3, D)), jnp.float32)


@functools.cache
def start(name):
    return jax.jit(make(name).init)(jax.random.key(5), latents(0))


@functools.cache
def trained(name, sizes=None, **options):
    """[(output, gradients to latents and parameters, state)] of each step; gradients move the parameters."""
    quantizer = make(name, None if sizes is None else mesh_of(*sizes), **options)
    variables = start(name)
    if quantizer.mesh is not None:
        variables = jax.device_put(variables, shardings(variables, quantizer.mesh, quantizer.rules))

    def loss(latent, params, state, key):
        output, state = quantizer.apply({"params": params, **state}, latent, train=True, key=key, mutable=[*state])
        terms = sum(weight * output.losses[name] for name, weight in quantizer.loss_weights.items())
        return terms + jnp.sum(vector_weights(latent) * output.vectors), (output, state)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    params, found = variables.get("params", {}), []
    state = {kind: value for kind, value in variables.items() if kind != "params"}
    for step in range(STEPS):
        latent = latents(step)
        if quantizer.mesh is not None:
            latent = jax.device_put(latent, NamedSharding(quantizer.mesh, BATCH))
        gradients, (output, state) = gradient(latent, params, state, jax.random.key(step))
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients[1])
        found.append((output, gradients, state))
    return found


def error(actual, expected):
    """Before restarts have moved codes from zero, some gradients are zero."""
    return relative_error(actual, expected) if np.any(expected) else np.abs(actual).max()


@pytest.mark.parametrize("sizes", MESHES)
@every
def test_three_steps_on_a_mesh_are_those_of_one_device(name, sizes):
    for one, other in zip(trained(name), trained(name, sizes), strict=True):
        np.testing.assert_array_equal(one[0].codes, other[0].codes)
        for term, loss in one[0].losses.items():
            np.testing.assert_allclose(other[0].losses[term], loss, rtol=1e-5)
        for part in (1, 2):
            errors = jax.tree.map(error, other[part], one[part])
            assert max(jax.tree.leaves(errors), default=0) < 1e-4, errors
    assert 5 < len(np.unique(one[0].codes)) < K - 5


@every
def test_its_rows_are_divided(name):
    state = trained(name, (2, 4))[-1][2]
    divided = [leaf for leaf in jax.tree.leaves(state) if np.shape(leaf)[:1] == (K,)]
    assert divided
    for leaf in divided:
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {K // 4}


@every
def test_an_evaluation_leaves_the_state_alone(name):
    variables, latent = start(name), latents(1)
    output, state = make(name).apply(variables, latent, mutable=[COLLECTIONS[name]])
    for before, after in zip(
        jax.tree.leaves(variables[COLLECTIONS[name]]), jax.tree.leaves(state[COLLECTIONS[name]]), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(make(name).apply(variables, latent).codes, output.codes)


@every
def test_folding_leaves_the_table_and_nothing_else(name):
    net = TokenizerNet(make(name), 32, (1,), 1, D)
    variables = {"params": {}} | {kind: {"quantizer": value} for kind, value in start(name).items()}
    plain, folded = fold(net, variables)
    assert list(folded) == ["params"]
    assert list(folded["params"]["quantizer"]) == ["codebook"]
    latent = latents(2)
    output = plain.quantizer.apply({"params": folded["params"]["quantizer"]}, latent)
    expected = make(name).apply(start(name), latent)
    np.testing.assert_array_equal(output.codes, expected.codes)
    np.testing.assert_allclose(output.vectors, expected.vectors, atol=1e-6)
    assert not plain.quantizer.foldable


@every
def test_the_estimator_may_be_dynamic(name):
    """The gradient of the vectors shrinks with the distance from the code; nothing else changes."""
    by = {kind: trained(name, estimator=kind)[0] for kind in ("straight_through", "dynamic")}
    straight, dynamic = by["straight_through"], by["dynamic"]
    np.testing.assert_array_equal(straight[0].vectors, dynamic[0].vectors)
    z, vectors, codes = (np.asarray(x, np.float64) for x in (latents(0), straight[0].vectors, straight[0].codes))
    distance = np.square(z - vectors).sum(axis=-1)
    smallest = np.vectorize(lambda code: distance[codes == code].min())(codes)
    weights = np.float64(vector_weights(z))
    expected = straight[1][0] - (1 - smallest / distance)[..., None] * weights
    np.testing.assert_allclose(dynamic[1][0], expected, rtol=1e-4, atol=1e-4)
    assert np.any(smallest < 0.5 * distance)


@every
def test_no_array_has_tokens_times_codes_and_rows_stay_where_they_are(name):
    """On a mesh of 2 x 4, with 64 blocks of 16 codes on every device."""
    big, tokens = 4096, 8 * 32 * 32
    quantizer = make(name, mesh_of(2, 4), codebook_size=big)
    latent = jax.device_put(jnp.zeros((8, 32, 32, D)), NamedSharding(quantizer.mesh, BATCH))
    variables = jax.eval_shape(quantizer.init, jax.random.key(0), latent)
    layout = shardings(variables, quantizer.mesh, quantizer.rules)
    variables = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), variables, layout
    )

    def loss(params, state, latent):
        output, state = quantizer.apply(
            {"params": params, **state}, latent, train=True, key=jax.random.key(0), mutable=[*state]
        )
        return sum(output.losses.values()) + output.vectors.sum(), state

    params = variables.get("params", {})
    state = {kind: value for kind, value in variables.items() if kind != "params"}
    program = jax.jit(jax.grad(loss, has_aux=True)).lower(params, state, latent).compile().as_text()
    sizes = {dims for _, dims in arrays(program)}
    assert size(tokens // 2, 16) in sizes  # a block of the search, for the tokens of a row of the mesh
    assert max(math.prod(dims) for dims in sizes) <= nearest_cpu.READ_AGAIN < tokens // 2 * big // 4
    # Sums over the rows of one device at most, or all tokens.
    assert max(math.prod(dims) for *_, dims in collectives(program)) <= max(big // 4, tokens) * D
