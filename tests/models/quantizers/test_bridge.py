import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.models.quantizers.bridge import (
    BridgeSpec,
    CodewiseBridge,
    VQBridge,
    group_codes,
    group_positions,
    make_bridge,
    parse_bridge,
    rows_of_groups,
    ungroup_codes,
)
from tests.helpers.golden_case import relative_error
from tests.helpers.slow_cases import slow
from tests.helpers.tiny import spread_codes

WIDTHS = {"XS": 32, "S": 64, "B": 128, "L": 256, "XL": 512}


@pytest.mark.parametrize("size", WIDTHS)
def test_names_of_every_size(size):
    assert parse_bridge(f"{size}/4") == BridgeSpec("vit", WIDTHS[size], 4, 2)
    assert parse_bridge(f"{size}/16-d12") == BridgeSpec("vit", WIDTHS[size], 16, 12)
    assert parse_bridge(f"{size}/8").group_size == 64


@pytest.mark.parametrize("name", ["none", "linear", "mlp5"])
def test_names_without_groups(name):
    assert parse_bridge(name) == BridgeSpec(name)
    assert parse_bridge(name).group_size == 1


@pytest.mark.parametrize(
    "name", ["", "L", "L/", "L/0", "M/4", "l/4", "L/4-d0", "L/4-d", "L/4d2", " L/4", "L/4\n", "L/-4", "mlp", "None"]
)
def test_other_names_are_refused_with_what_exists(name):
    with pytest.raises(ValueError, match=re.escape(repr(name)) + ".*none, linear, mlp5 or SIZE/P.*XS, S, B, L, XL"):
        parse_bridge(name)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(patch=st.integers(1, 4), side=st.integers(1, 4), d=st.integers(1, 5), groups=st.sampled_from(["1d", "2d"]))
def test_ungrouping_reverses_grouping(patch, side, d, groups):
    k = (patch * side) ** 2
    codebook = jnp.arange(k * d, dtype=jnp.float32).reshape(k, d)
    grouped = group_codes(codebook, patch**2, groups)
    assert grouped.shape == (side**2, patch**2 * d)
    np.testing.assert_array_equal(ungroup_codes(grouped, patch**2, groups), codebook)


@pytest.mark.parametrize("groups", ["1d", "2d"])
def test_positions_are_those_in_which_groups_are_flattened(groups):
    positions = group_positions(144, 9, groups)
    grouped = group_codes(jnp.asarray(positions[:, None], jnp.float32), 9, groups)
    np.testing.assert_array_equal(grouped, np.tile(np.arange(9), (16, 1)))
    quantizer = make_quantizer({"name": "vector", "codebook_size": 144, "bridge": "S/3", "bridge_groups": groups})
    np.testing.assert_array_equal(quantizer.positions(), positions)
    assert len(set(positions[:3])) == 3
    assert positions[3] == (0 if groups == "2d" else 3)


def test_2d_groups_are_patches_of_the_raster():
    codebook = jnp.asarray(np.random.default_rng(0).normal(size=(144, 5)), jnp.float32)
    raster = np.asarray(codebook).reshape(12, 12, 5)
    grouped = group_codes(codebook, 9, "2d")
    for i in range(4):
        for j in range(4):
            patch = raster[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            np.testing.assert_array_equal(grouped[4 * i + j], patch.ravel())


def test_1d_groups_are_runs_of_codes():
    codebook = jnp.asarray(np.random.default_rng(0).normal(size=(24, 5)), jnp.float32)
    grouped = group_codes(codebook, 4, "1d")
    for i in range(6):
        np.testing.assert_array_equal(grouped[i], np.asarray(codebook)[4 * i : 4 * i + 4].ravel())


def test_rows_of_groups():
    assert rows_of_groups(16384, 16, "2d") == 32
    assert rows_of_groups(16384, 16, "1d") == 1024
    assert rows_of_groups(48, 16, "1d") == 3
    assert rows_of_groups(64, 1, "2d") == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 16, "1d"), "100 codes are not divisible by groups of 16"),
        ((32, 16, "2d"), "32 codes are not a square, which 2d patches need"),
        ((36, 16, "2d"), "the 6 x 6 raster of 36 codes is not divisible by 4 x 4 patches"),
    ],
)
def test_groups_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rows_of_groups(*arguments)


def random_codebook(k=64, d=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(k, d)), jnp.float32)


def spread_bridge(bridge, codebook, seed=0):
    """Its parameters with a last layer that is not zero."""
    params = jax.jit(bridge.init)(jax.random.key(seed), codebook)["params"]
    return spread_codes({"bridge": params}, seed)["bridge"]


@pytest.mark.parametrize("groups", ["2d", *slow("1d")])
def test_a_fresh_bridge_maps_every_code_to_zero(groups):
    bridge = make_bridge("XS/2", groups, jnp.float32)
    table, _ = jax.jit(bridge.init_with_output)(jax.random.key(0), random_codebook())
    assert table.shape == (64, 8)
    assert not np.any(table)


def moved_codes(name, groups="2d"):
    """Which rows of the searched table change when gradient descent follows a loss on code 5 alone."""
    bridge, codebook = make_bridge(name, groups, jnp.float32), random_codebook()
    params = {} if bridge is None else spread_bridge(bridge, codebook)

    @jax.jit
    def changes(params, codebook):
        def table(params, codebook):
            return codebook if bridge is None else bridge.apply({"params": params}, codebook)

        def loss(params, codebook):
            return jnp.sum(jnp.square(table(params, codebook)[5] - 1))

        steps = jax.grad(loss, argnums=(0, 1))(params, codebook)
        moved = jax.tree.map(lambda x, g: x - 0.01 * g, (params, codebook), steps)
        return jnp.abs(table(*moved) - table(params, codebook)).max(axis=1)

    return np.flatnonzero(np.asarray(changes(params, codebook)) > 1e-6)


@pytest.mark.parametrize("name", ["XS/2-d1", "XS/4-d1", "linear", "mlp5"])
def test_through_a_bridge_one_code_moves_all(name):
    np.testing.assert_array_equal(moved_codes(name), np.arange(64))


def test_without_a_bridge_one_code_moves_alone():
    np.testing.assert_array_equal(moved_codes("none"), [5])


def test_groups_exchange_information():
    """Attention connects the groups: one code's input reaches every output, which codewise layers cannot do."""
    codebook = random_codebook()

    def reached(bridge):
        params = spread_bridge(bridge, codebook)
        nudged = codebook.at[5].add(0.1)
        difference = jax.jit(bridge.apply)({"params": params}, nudged) - bridge.apply({"params": params}, codebook)
        return np.flatnonzero(np.abs(difference).max(axis=1) > 1e-7)

    np.testing.assert_array_equal(reached(make_bridge("XS/2", "2d", jnp.float32)), np.arange(64))
    np.testing.assert_array_equal(reached(make_bridge("mlp5", "2d", jnp.float32)), [5])


def test_the_kind_of_groups_is_used():
    codebook = random_codebook()
    params = spread_bridge(make_bridge("XS/2", "2d", jnp.float32), codebook)
    tables = [make_bridge("XS/2", groups, jnp.float32).apply({"params": params}, codebook) for groups in ("1d", "2d")]
    assert relative_error(*tables) > 0.1


def count(name, d=8, k=256):
    params = jax.eval_shape(
        make_bridge(name, "2d", jnp.float32).init, jax.random.key(0), jax.ShapeDtypeStruct((k, d), jnp.float32)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("name", "c", "p", "n"), [("XS/2", 32, 2, 2), ("S/4-d3", 64, 4, 3), ("XL/2-d1", 512, 2, 1)])
def test_parameter_counts_follow_size_patch_and_depth(name, c, p, n):
    group = p * p * 8
    ends = group * c + c + c * group + group
    block = (3 * c * c + 3 * c) + (c * c + c) + (2 * c * c + 2 * c) + (2 * c * c + c)
    assert count(name) == ends + n * block


def test_codewise_bridges_have_one_and_five_layers_with_gelu_between():
    codebook = random_codebook()
    linear, mlp = make_bridge("linear", "2d", jnp.float32), make_bridge("mlp5", "2d", jnp.float32)
    assert count("linear") == 8 * 8 + 8
    assert count("mlp5") == 5 * (8 * 8 + 8)
    params = spread_bridge(linear, codebook)["linear0"]
    expected = codebook @ params["kernel"] + params["bias"][None]
    np.testing.assert_allclose(linear.apply({"params": {"linear0": params}}, codebook), expected, atol=1e-5)

    params = spread_bridge(mlp, codebook)
    expected = codebook
    for i in range(5):
        layer = params[f"linear{i}"]
        expected = (expected if i == 0 else nn.gelu(expected)) @ layer["kernel"] + layer["bias"][None]
    np.testing.assert_allclose(mlp.apply({"params": params}, codebook), expected, atol=1e-5)


def test_no_bridge_for_none():
    assert make_bridge("none", "2d", jnp.float32) is None
    assert isinstance(make_bridge("linear", "2d", jnp.float32), CodewiseBridge)
    assert isinstance(make_bridge("L/4", "2d", jnp.float32), VQBridge)


@functools.cache
def bfloat16_table():
    """A bridged codebook whose codes stand 1e-3 apart at a distance of 1: below the resolution of bfloat16."""
    bridge, codebook = make_bridge("XS/2", "2d", jnp.bfloat16), random_codebook(256)
    params = spread_bridge(bridge, codebook)
    recover = params["recover"]
    params["recover"] = {"kernel": recover["kernel"] * 1e-3, "bias": recover["bias"] + 1}
    return bridge, params, codebook, jax.jit(bridge.apply)({"params": params}, codebook)


def test_under_bfloat16_codes_stay_float32_and_distinct():
    _, params, _, table = bfloat16_table()
    assert table.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert len(np.unique(table, axis=0)) == 256
    assert len(np.unique(table.astype(jnp.bfloat16).astype(jnp.float32), axis=0)) < 256


def test_bfloat16_blocks_give_nearly_the_same_codes():
    bridge, params, codebook, table = bfloat16_table()
    in_float32 = jax.jit(bridge.clone(dtype=jnp.float32).apply)({"params": params}, codebook)
    assert 1e-4 < relative_error(table - 1, in_float32 - 1) < 0.05


@pytest.mark.parametrize(("dtype", "highest"), [(jnp.float32, 14), (jnp.bfloat16, 1)])
def test_float32_products_are_at_highest_precision(dtype, highest):
    """All 2 + 2 * (4 + 2) products in float32; under bfloat16 that of the last layer."""
    bridge, codebook = make_bridge("XS/2", "2d", dtype), random_codebook()
    params = jax.eval_shape(bridge.init, jax.random.key(0), codebook)
    jaxpr = str(jax.make_jaxpr(bridge.apply)(params, codebook))
    assert jaxpr.count("Precision.HIGHEST, Precision.HIGHEST") == highest
    assert jaxpr.count("dot_general") == 14
