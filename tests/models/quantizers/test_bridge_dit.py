import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.bridge import BridgeSpec, bridge_name, make_bridge, parse_bridge, position_embedding
from fvq_jax.training.optim import make_optimizer
from tests.helpers.golden_case import relative_error
from tests.helpers.tiny import spread_codes


def random_codebook(k=64, d=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(k, d)), jnp.float32)


def fresh(name, groups="2d", dtype=jnp.float32):
    bridge = make_bridge(name, groups, dtype)
    return bridge, jax.jit(bridge.init)(jax.random.key(0), random_codebook())["params"]


def test_names():
    assert parse_bridge("dit-S/4") == BridgeSpec("dit", 64, 4, 2)
    assert parse_bridge("dit-XL/8-d3") == BridgeSpec("dit", 512, 8, 3)
    assert parse_bridge("dit-L/4-c1000") == BridgeSpec("dit", 256, 4, 2, classes=1000)
    for name in (
        "dit-XS/2",
        "dit-L/16-d5",
        "dit-L/4-c1000",
        "dit-B/2-d4-c7",
        "B/4",
        "S/2-d1",
        "linear",
        "mlp5",
        "none",
    ):
        assert bridge_name(parse_bridge(name)) == name
    for name in ("dit-M/4", "L/4-c10", "dit-L/4-c0", "dit-L/4-c10-d2"):
        with pytest.raises(ValueError, match=rf"unknown bridge '{name}'.*dit-SIZE/P\[-dN\].*-cN a table for each"):
            parse_bridge(name)
    with pytest.raises(ValueError, match="no bridge is 48 wide: the sizes are 32, 64, 128, 256, 512"):
        bridge_name(BridgeSpec("vit", 48, 4, 2))


@pytest.mark.parametrize("groups", ["1d", "2d"])
def test_it_starts_at_zero_with_blocks_that_are_the_identity(groups):
    """adaLN-zero: no block changes anything, whatever the codebook, and the last layer is zero."""
    bridge, params = fresh("dit-XS/2", groups)
    assert not np.any(bridge.apply({"params": params}, random_codebook()))
    for name in ("block0", "block1"):
        assert not np.any(params[name]["modulation"]["kernel"])
        assert np.any(params[name]["qkv"]["kernel"])
    params = spread_codes({"bridge": params})["bridge"]
    without_blocks = {**params, "block0": jax.tree.map(jnp.ones_like, params["block0"])}
    without_blocks["block0"]["modulation"] = params["block0"]["modulation"]
    tables = [bridge.apply({"params": p}, random_codebook()) for p in (params, without_blocks)]
    assert np.any(tables[0])
    np.testing.assert_array_equal(*tables)


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = position_embedding(9, 32, "2d")
    assert table.dtype == np.float32
    for index in range(9):
        row, column = divmod(index, 3)
        for i in range(8):
            wave = 10000 ** (-i / 8)
            expected = [np.sin(column * wave), np.cos(column * wave), np.sin(row * wave), np.cos(row * wave)]
            np.testing.assert_allclose(table[index, i::8], expected, atol=1e-6)


def test_1d_groups_have_the_position_of_their_index():
    table = position_embedding(6, 32, "1d")
    for i in range(16):
        wave = 10000 ** (-i / 16)
        np.testing.assert_allclose(table[:, i], np.sin(np.arange(6) * wave), atol=1e-6)
        np.testing.assert_allclose(table[:, 16 + i], np.cos(np.arange(6) * wave), atol=1e-6)
    _, params = fresh("dit-XS/2", "1d")
    np.testing.assert_array_equal(params["position_embedding"], position_embedding(16, 32, "1d"))


def test_positions_count_and_are_never_trained_while_the_rest_is():
    bridge, params = fresh("dit-XS/2")
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    codebook, before = random_codebook(), params["position_embedding"]

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: jnp.sum(jnp.sin(bridge.apply({"params": p}, codebook))))(params)

    grads = gradients(params)
    norms = {
        jax.tree_util.keystr(path): np.abs(leaf).max() for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    assert norms.pop("['position_embedding']") == 0
    # A key's bias shifts all scores of a query alike, so only part of qkv's bias counts, but part does.
    assert min(norms.values()) > 0, norms
    optimizer = make_optimizer(lambda _: 0.1, b1=0.9, b2=0.95, clip_norm=1.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    after = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_array_equal(after["position_embedding"], before)
    moved = {**params, "position_embedding": before[::-1]}
    assert relative_error(bridge.apply({"params": moved}, codebook), bridge.apply({"params": params}, codebook)) > 1e-3


def test_under_bfloat16_codes_and_parameters_stay_float32():
    bridge, params = fresh("dit-XS/2", dtype=jnp.bfloat16)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    table = jax.jit(bridge.apply)({"params": params}, random_codebook())
    exact = jax.jit(bridge.clone(dtype=jnp.float32).apply)({"params": params}, random_codebook())
    assert table.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert 1e-5 < relative_error(table, exact) < 0.05


def test_every_class_has_a_table_and_the_last_one_is_that_of_no_class():
    bridge, params = fresh("dit-XS/2-c3")
    assert params["class_embedding"].shape == (4, 32)
    params = spread_codes({"bridge": params})["bridge"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    table = jax.jit(lambda params, *condition: bridge.apply({"params": params}, random_codebook(), *condition))
    tables = [table(params, number) for number in range(4)]
    assert min(relative_error(tables[i], tables[j]) for i in range(4) for j in range(i)) > 1e-3
    np.testing.assert_array_equal(table(params), tables[3])
    # Each is that of a bridge without classes that has this row alone.
    plain = make_bridge("dit-XS/2", "2d", jnp.float32)
    for number, expected in enumerate(tables):
        row = {**params, "class_embedding": params["class_embedding"][number : number + 1]}
        assert relative_error(jax.jit(plain.apply)({"params": row}, random_codebook()), expected) < 1e-6
