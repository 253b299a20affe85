import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from fvq_jax.interop.gpt_layout import gpt_params
from fvq_jax.models import gpt
from fvq_jax.models.gpt import GPT, RULES, SIZES, dropped, hidden_width, rms_norm, rotate, rotations
from fvq_jax.ops.token_loss import token_nll
from fvq_jax.runtime.mesh import BATCH, shardings
from tests.helpers.compiled_program import collectives, size
from tests.helpers.golden64 import in_float32, in_float64, published_generator, relative_norm
from tests.helpers.golden_case import load_case, relative_error
from tests.helpers.slow_cases import MESHES, slow
from tests.helpers.tiny_generator import mesh_of

NET = GPT(vocab=48, classes=5, grid=(3, 4), layers=3, width=32, heads=4, hidden=40, dropout=0.0, class_dropout=0.0)
PUBLISHED = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672, "3B": 3_096_659_200}


@functools.cache
def random_params(net=NET):
    """Parameters that are all different from 0, so that every one matters."""
    params = jax.eval_shape(net.init, jax.random.key(0), *batch(net))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), params)


def batch(net=NET, images=8, seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, net.classes, images, dtype=np.int32)
    return jnp.asarray(labels), jnp.asarray(rng.integers(0, net.vocab, (images, net.length), dtype=np.int32))


@functools.partial(jax.jit, static_argnames=("net", "train"))
def hidden(net, params, labels, codes, train=False, key=None):
    return net.apply({"params": params}, labels, codes, train=train, key=key)


def trained(net, seed=0, params=None, given=None):
    """Hidden states in training."""
    return np.asarray(hidden(net, params or random_params(), *(given or batch()), train=True, key=jax.random.key(seed)))


def loss_and_gradient(net, params, labels, codes, key=None):
    def loss(params):
        states = net.apply({"params": params}, labels, codes, train=key is not None, key=key)
        nll, _ = token_nll(states, params["output"], codes, mesh=net.mesh, dtype=net.dtype)
        return nll.mean(), states

    (value, states), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, states, gradient


# --- the published network ------------------------------------------------------------------------------------------


def test_logits_loss_and_gradients_equal_the_published_ones():
    expected, actual = load_case("llamagen_gpt").outputs, in_float64("llamagen_gpt")
    assert {value.dtype.name for value in actual.values()} == {"float64"}
    assert relative_error(actual["logits"], expected["logits"]) < 1e-5
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
    norms = {key.removeprefix("gradnorm/"): float(x) for key, x in expected.items() if key.startswith("gradnorm/")}
    assert {f"grad/{key}" for key in norms} == set(actual) - {"logits", "loss"}
    for key, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(actual[f"grad/{key}"]), norm, rtol=1e-3, err_msg=key)


@pytest.mark.slow
def test_float32_is_near_float64():
    actual, expected = in_float32("llamagen_gpt"), in_float64("llamagen_gpt")
    assert {value.dtype.name for value in actual.values()} == {"float32"}
    for key, value in expected.items():
        assert relative_norm(actual[key], value) < 1e-5, key


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_greedy_codes_equal_the_published_ones(guidance):
    """The likeliest code after the other, without a cache."""
    case = load_case("llamagen_gpt")
    net = published_generator(case.config)
    params = jax.tree.map(jnp.asarray, gpt_params(case.weights, net))
    run = jax.jit(lambda labels, codes: net.apply({"params": params}, labels, codes, method="logits"))
    labels = jnp.asarray(case.inputs["labels"], jnp.int32)
    codes = np.zeros((len(labels), net.length), np.int32)
    for position in range(net.length):
        logits = run(labels, jnp.asarray(codes))[:, position]
        none = run(jnp.full_like(labels, net.classes), jnp.asarray(codes))[:, position]
        codes[:, position] = np.argmax(none + guidance * (logits - none), axis=-1)
    np.testing.assert_array_equal(codes, case.outputs[f"greedy_cfg{guidance}"])


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(name):
    chosen = SIZES[name]
    net = GPT(16_384, 1000, (16, 16), chosen.layers, chosen.width, chosen.heads)
    params = jax.eval_shape(net.init, jax.random.key(0), *batch(net, 1))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED[name]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert params["layers"]["w1"].shape[-1] == hidden_width(chosen.width)


def test_a_new_network_finds_every_code_equally_likely():
    labels, codes = batch()
    params = jax.jit(NET.init)(jax.random.key(0), labels, codes)["params"]
    value, _, _ = loss_and_gradient(NET, params, labels, codes)
    np.testing.assert_allclose(value, np.log(NET.vocab), rtol=5e-6)
    for name in ("wqkv", "wo", "w1", "w3", "w2"):
        np.testing.assert_allclose(params["layers"][name].std(), 0.02, rtol=0.05)


# --- its parts ------------------------------------------------------------------------------------------------------


def test_angles_are_those_of_the_own_cell_and_the_class_has_none():
    rows, columns, width, base = 2, 3, 8, 100.0
    cos, sin = rotations((rows, columns), width, base)
    assert cos.shape == sin.shape == (rows * columns, width // 2)
    assert not cos[0].any()
    assert not sin[0].any()
    for position in range(1, rows * columns):
        row, column = divmod(position - 1, columns)  # the input at a position is the code before it
        angles = [row, row * base**-0.5, column, column * base**-0.5]
        np.testing.assert_allclose(cos[position], np.cos(angles), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(sin[position], np.sin(angles), rtol=1e-6, atol=1e-7)


def test_neighbouring_channels_are_rotated_together():
    """As complex numbers: channels 0 and 1 are the first one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 3, 8)).astype(np.float32)
    cos, sin = rotations((2, 3), 8, 100.0)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[None, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    actual = rotate(jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(actual[:, 1:], axis=-1), np.linalg.norm(x[:, 1:], axis=-1), rtol=1e-5
    )  # lengths stay


def test_keys_and_queries_of_the_class_are_zero_and_its_values_are_not():
    layer = jax.tree.map(lambda leaf: leaf[0], random_params()["layers"])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, NET.length, NET.width)), jnp.float32)
    cos, sin = map(jnp.asarray, rotations(NET.grid, NET.head_width))
    q, k, v = gpt.queries_keys_values(layer, x, cos, sin, heads=NET.heads, eps=NET.eps, dtype=jnp.float32)
    assert not np.any(q[:, 0])
    assert not np.any(k[:, 0])
    assert np.all(np.any(q[:, 1:], axis=-1))
    assert np.all(np.any(v, axis=-1))
    # Queries come first, then keys, then values, each of all heads.
    mixed = np.asarray(rms_norm(x, layer["attention_norm"], NET.eps)) @ layer["wqkv"]
    np.testing.assert_allclose(v.reshape(2, NET.length, -1), mixed[..., 2 * NET.width :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_are_computed_in_float32(dtype):
    x = jnp.asarray(100 * np.random.default_rng(0).standard_normal((2, 5, 64)), dtype)
    weight = jnp.linspace(0.5, 2, 64, dtype=jnp.float32)
    actual = rms_norm(x, weight, 1e-5)
    assert actual.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    np.testing.assert_allclose(actual, exact, rtol=2e-6)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(position=st.integers(0, NET.length - 1), seed=st.integers(0, 99))
def test_no_state_depends_on_the_code_it_predicts_or_later_ones(position, seed):
    labels, codes = batch()
    rng = np.random.default_rng(seed)
    later = np.arange(NET.length)[None] >= position
    changed = jnp.where(later, (codes + rng.integers(1, NET.vocab, codes.shape)) % NET.vocab, codes)
    before, after = (hidden(NET, random_params(), labels, x) for x in (codes, changed))
    np.testing.assert_array_equal(before[:, : position + 1], after[:, : position + 1])
    if position < NET.length - 1:
        assert np.all(np.any(before[:, position + 1 :] != after[:, position + 1 :], axis=-1))


def test_every_state_depends_on_the_class():
    labels, codes = batch()
    states = [hidden(NET, random_params(), x, codes) for x in (labels, (labels + 1) % (NET.classes + 1))]
    assert np.all(np.any(states[0] != states[1], axis=-1))


def test_products_are_in_dtype_and_the_residual_stream_is_not():
    labels, codes = batch()
    params = random_params()
    exact = hidden(NET, params, labels, codes)
    narrow = hidden(NET.clone(dtype=jnp.bfloat16), params, labels, codes)
    assert narrow.dtype == jnp.float32
    assert 1e-4 < relative_norm(narrow, exact) < 0.05
    # With layers that add nothing, no digit is lost.
    nothing = {**params, "layers": {name: 0 * value for name, value in params["layers"].items()}}
    same = (hidden(NET.clone(dtype=dtype), nothing, labels, codes) for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_array_equal(*same)


# --- what is dropped in training ------------------------------------------------------------------------------------


def test_what_is_kept_is_scaled_up():
    x = jnp.ones((100, 100))
    found = np.asarray(dropped(x, 0.25, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(found), [0, 4 / 3], rtol=1e-6)
    np.testing.assert_allclose(found.mean(), 1, atol=0.03)
    rows = np.asarray(dropped(x, 0.25, jax.random.key(0), (100, 1)))
    assert np.all(rows == rows[:, :1])
    assert 0.6 < (rows[:, 0] > 0).mean() < 0.9


def test_training_without_dropouts_is_the_same_as_evaluation():
    np.testing.assert_array_equal(trained(NET), hidden(NET, random_params(), *batch()))


def test_training_needs_a_key():
    with pytest.raises(ValueError, match="needs a key"):
        NET.apply({"params": random_params()}, *batch(), train=True)


def test_embeddings_and_both_branches_of_every_layer_are_dropped():
    net = NET.clone(dropout=0.4)
    assert np.all(np.any(trained(net) != trained(NET), axis=-1))
    assert np.any(trained(net, seed=0) != trained(net, seed=1))
    labels, codes = batch()
    np.testing.assert_array_equal(hidden(net, random_params(), labels, codes), hidden(NET, random_params(), *batch()))


def test_a_dropped_class_is_no_class():
    net = NET.clone(class_dropout=0.5)
    labels, codes = batch(images=64)
    none = jnp.full_like(labels, net.classes)
    found = trained(net, given=(labels, codes))
    kept, lost = (np.asarray(hidden(NET, random_params(), x, codes)) for x in (labels, none))
    is_lost = np.array([np.array_equal(a, b) for a, b in zip(found, lost, strict=True)])
    is_kept = np.array([np.array_equal(a, b) for a, b in zip(found, kept, strict=True)])
    assert np.all(is_lost ^ is_kept)
    assert 0.3 < is_lost.mean() < 0.7


def test_paths_of_an_image_are_dropped_whole_and_more_often_in_later_layers():
    """Three layers, of which the first is never dropped, the second at half the rate of the last."""
    net = NET.clone(path_dropout=0.6)
    images = 400
    labels, codes = (jnp.repeat(x[:1], images, axis=0) for x in batch())
    params = random_params()
    found = trained(net, given=(labels, codes))
    kinds, index = np.unique(found.round(4).reshape(images, -1), axis=0, return_inverse=True)
    assert len(kinds) == 2**4  # two branches in each of two layers
    # Without the last two layers, an image is what the first makes of it.
    first = {**params, "layers": {name: value[:1] for name, value in params["layers"].items()}}
    alone = hidden(NET.clone(layers=1), first, labels[:1], codes[:1])
    share = np.isclose(found, alone, atol=1e-4).all(axis=(1, 2)).mean()
    np.testing.assert_allclose(share, 0.3**2 * 0.6**2, atol=0.03)
    assert np.bincount(index.ravel()).min() > 0


def test_dropping_paths_replaces_the_dropout_inside_layers(monkeypatch):
    seen = []

    def note(x, rate, key, shape=None):
        seen.append((rate if isinstance(rate, float) else "grows", shape))
        return x

    monkeypatch.setattr(gpt, "dropped", note)
    labels, codes = batch()
    for path, inside in ((0.0, (0.25, None)), (0.3, ("grows", (len(labels), 1, 1)))):
        seen.clear()
        net = NET.clone(dropout=0.25, path_dropout=path)
        net.apply({"params": random_params()}, labels, codes, train=True, key=jax.random.key(0))
        assert seen[0] == (0.25, None)  # the embeddings
        assert set(seen[1:]) == {inside}


@pytest.mark.slow
@pytest.mark.parametrize("option", ["remat", "unroll"])
def test_recomputing_and_unrolling_layers_gives_the_same_loss_and_gradient(option):
    net = NET.clone(dropout=0.1, class_dropout=0.1, path_dropout=0.3)
    results = []
    for value in (False, True):
        run = jax.jit(functools.partial(loss_and_gradient, net.clone(**{option: value})))
        results.append(run(random_params(), *batch(), jax.random.key(0)))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    for actual, expected in zip(jax.tree.leaves(results[1][2]), jax.tree.leaves(results[0][2]), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-5)


def operations(jaxpr):
    """Names of all operations, those of functions and loops included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                yield from operations(value)


def test_random_numbers_are_drawn_once_and_products_computed_once():
    """In the backward pass neither is computed again, but what lies between products is."""
    net = NET.clone(dropout=0.1, class_dropout=0.1)
    counts = {}
    for remat in (False, True):
        run = functools.partial(loss_and_gradient, net.clone(remat=remat))
        counts[remat] = Counter(operations(jax.make_jaxpr(run)(random_params(), *batch(), jax.random.key(0)).jaxpr))
    assert counts[False]["random_bits"] == 4  # of classes, embeddings and both branches of a layer
    assert counts[True]["random_bits"] == 6
    assert counts[True]["dot_general"] - counts[False]["dot_general"] == 6  # all of a layer but the last
    assert counts[True]["rsqrt"] == counts[False]["rsqrt"]


@pytest.mark.parametrize("unroll", [False, True])
def test_several_blocks_of_queries_give_the_same(unroll, monkeypatch):
    expected = on_one_device()
    monkeypatch.setattr("fvq_jax.ops.causal_attention.QUERIES", 5)  # three blocks
    run = jax.jit(functools.partial(loss_and_gradient, NET.clone(unroll=unroll)))
    for actual, wanted in zip(jax.tree.leaves(run(random_params(), *batch())), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_cpu_transposes_activations_for_the_gradients_of_kernels():
    traced = jax.jit(functools.partial(loss_and_gradient, NET)).trace(random_params(), *batch())
    barriers = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier")
        for platform in ("cpu", "tpu")
    }
    assert barriers["cpu"] == barriers["tpu"] + 5  # of a layer: for queries, keys and values, wo, w1, w3 and w2


def test_unrolled_layers_are_no_loop():
    for unroll in (False, True):
        run = functools.partial(NET.clone(unroll=unroll).apply, {"params": random_params()}, *batch())
        assert ("while" in jax.jit(run).lower().as_text()) != unroll


# --- on several devices ---------------------------------------------------------------------------------------------


def placed(mesh, params, labels, codes):
    layout = shardings({"generator": {"params": params}}, mesh, RULES)["generator"]["params"]
    rows = NamedSharding(mesh, BATCH)
    return jax.device_put((params, labels, codes), (layout, rows, rows))


def sharded(net, mesh, params):
    """Loss, states and gradient on a mesh, gradients laid out as parameters."""
    layout = shardings({"generator": {"params": params}}, mesh, RULES)["generator"]["params"]
    run = functools.partial(loss_and_gradient, net.clone(mesh=mesh))
    return jax.jit(run, out_shardings=(None, NamedSharding(mesh, BATCH), layout))


@functools.cache
def on_one_device():
    return jax.jit(functools.partial(loss_and_gradient, NET))(random_params(), *batch())


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same_states_loss_and_gradient(sizes):
    mesh = mesh_of(*sizes)
    value, states, gradient = sharded(NET, mesh, random_params())(*placed(mesh, random_params(), *batch()))
    expected = on_one_device()
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(states, expected[1], atol=2e-5)
    for (path, actual), wanted in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected[2]), strict=True):
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("sizes", [(2, 4), *slow((8, 1))])
def test_weights_are_gathered_and_activations_are_not(sizes):
    """Forward and backward in bfloat16. A CPU may send bfloat16 as numbers of another type, so sizes are compared."""
    mesh = mesh_of(*sizes)
    net = NET.clone(dtype=jnp.bfloat16, grid=(3, 7), classes=6)
    given = placed(mesh, random_params(net), *batch(net, images=16))
    found = collectives(sharded(net, mesh, random_params(net)).lower(*given).compile().as_text())
    gathered = {dims for kind, _, dims in found if kind == "all-gather"}
    d, f, t, each = net.width, net.hidden, net.length, 16 // 8
    weights = {(d, 3 * d), (d, d), (d, f)}
    for shape in weights:
        assert any(np.prod(dims) == np.prod(shape) for dims in gathered), shape
    assert not [dims for kind, _, dims in found if t in dims or each * t in dims if kind == "all-gather" and d in dims]
    assert size(net.layers, d, f) not in gathered  # never all layers at once
