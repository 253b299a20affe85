import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import path_name
from fvq_jax.training.state import RULES, NetworkState, TrainState, abstract_state, create_state, with_params
from tests.helpers.tiny import make_step, tiny_config

LAYOUT = (("/quantizer/codebook$", P("codebook")), ("/encoder/", P()))


def small_init(key):
    """A state as a task makes it, without the compile time of a convolutional network."""
    codebook = jax.random.normal(key, (64, 8))
    params = {"quantizer": {"codebook": codebook}, "encoder": {"kernel": jax.random.normal(key, (3, 5))}}
    opt_state = {"mu": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.int32)}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, {"tokenizer": NetworkState(params, opt_state, {})}, jax.tree.map(jnp.copy, params))


@functools.cache
def real_state():
    """A tokenizer, its discriminator and a moving average on 2 x 4 devices."""
    mesh = make_mesh(2, 4)
    changes = {"adversarial.weight": 0.5, "optim.ema_decay": 0.9}
    small = {"tokenizer.quantizer.bridge": "XS/2-d1", "tokenizer.ch_mult": (1,)}
    step = make_step(tiny_config(**changes | small), mesh)
    return step, create_state(step.init, 0, step.abstract())


EVERYTHING = {"adversarial.weight": 0.5, "adversarial.layers": 2, "optim.ema_decay": 0.9}


@functools.cache
def announced(codebook_rate=0.0, bridge="XS/2-d1", kept=False):
    """The abstract state with all that a run can have (discriminator, moving average, separate codebook rate, and with
    `kept` all that the quantizer can keep), and the rules of its layout."""
    own = {"restart_after": 1.0, "region_window": 2} if kept else {}
    changes = {"optim.codebook_learning_rate": codebook_rate, "tokenizer.quantizer.bridge": bridge}
    config = tiny_config(**EVERYTHING | changes | {f"tokenizer.quantizer.{name}": value for name, value in own.items()})
    step = make_step(config, make_mesh(2, 4))
    return step.abstract(), (*RULES, *step.task.rules)


def names(state):
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(state)]


@pytest.mark.parametrize("codebook_rate", [0.0, 1e-3])
@pytest.mark.parametrize("bridge", ["XS/2-d1", "mlp5", "none"])
def test_every_array_of_the_state_matches_exactly_one_rule(codebook_rate, bridge):
    state, rules = announced(codebook_rate, bridge)
    paths = names(state)
    assert {"step", "skipped", "ema/quantizer/codebook", "networks/tokenizer/params/quantizer/codebook"} <= set(paths)
    for name in paths:
        assert sum(bool(re.search(pattern, name)) for pattern, _ in rules) == 1, name


def test_every_rule_is_needed():
    state, rules = announced(kept=True)
    paths = names(state)
    for name in paths:
        assert sum(bool(re.search(pattern, name)) for pattern, _ in rules) == 1, name
    for pattern, _ in rules:
        assert [name for name in paths if re.search(pattern, name)], pattern


@pytest.mark.parametrize("codebook_rate", [0.0, 1e-3])
def test_codebook_moments_and_average_are_cut_into_rows_and_nothing_else_is(codebook_rate):
    cut = [
        path_name(path)
        for path, leaf in jax.tree.leaves_with_path(announced(codebook_rate)[0])
        if leaf.sharding.spec != P()
    ]
    assert len(cut) == 4  # codebook, both moments, moving average
    assert all(name.endswith("/quantizer/codebook") for name in cut)
    assert sum("/mu/" in name for name in cut) == 1
    assert sum("/nu/" in name for name in cut) == 1
    assert sum(name.startswith("ema/") for name in cut) == 1


def bytes_per_device(array):
    return {shard.data.nbytes for shard in array.addressable_shards}


def test_moments_and_average_are_cut_like_the_codebook_itself():
    _, state = real_state()
    cut, whole = 0, 0
    for path, leaf in jax.tree.leaves_with_path(state):
        if path_name(path).endswith("/quantizer/codebook"):
            assert bytes_per_device(leaf) == {leaf.nbytes // 4}
            cut += 1
        else:
            assert bytes_per_device(leaf) == {leaf.nbytes}
            whole += 1
        assert len(leaf.addressable_shards) == 8
    assert cut == 4
    assert whole > 50


def test_the_state_is_as_the_abstract_one_announces():
    step, state = real_state()
    abstract = abstract_state(step.init, step.mesh, step.task.rules)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for expected, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert isinstance(expected, jax.ShapeDtypeStruct)
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_the_real_state_starts_at_step_zero_with_float32_parameters():
    _, state = real_state()
    assert int(state.step) == int(state.skipped) == 0
    assert set(state.networks) == {"tokenizer", "discriminator"}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.networks["tokenizer"].params)
    assert state.networks["discriminator"].variables.keys() == {"batch_stats"}
    assert state.networks["discriminator"].variables["batch_stats"]
    assert state.networks["tokenizer"].variables == {}


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)])
def test_the_mesh_changes_no_number(sizes):
    mesh = make_mesh(*sizes)
    state = create_state(small_init, 3, abstract_state(small_init, mesh, LAYOUT))
    expected = jax.jit(small_init)(jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected)
    codebook = state.networks["tokenizer"].params["quantizer"]["codebook"]
    assert bytes_per_device(codebook) == {codebook.nbytes // sizes[1]}


def test_the_seed_decides():
    mesh = make_mesh(8, 1)
    states = [
        create_state(small_init, seed, abstract_state(small_init, mesh, LAYOUT)).ema["encoder"]["kernel"]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(states[0], states[1])
    assert np.any(states[0] != states[2])


def test_the_codebook_is_never_whole_on_a_device():
    """The compiled initialisation holds row blocks only."""
    mesh = make_mesh(1, 8)

    def init(key):
        codebook = jax.random.uniform(key, (8 * 37, 11))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, {"tokenizer": NetworkState({"quantizer": {"codebook": codebook}}, {}, {})}, {})

    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, mesh, LAYOUT))
    text = jax.jit(init, out_shardings=layout).lower(jax.random.key(0)).compile().as_text()
    assert "[37,11]" in text
    assert "[296,11]" not in text


def test_a_network_can_start_from_given_parameters_and_its_average_with_it():
    state = create_state(small_init, 3, abstract_state(small_init, make_mesh(2, 4), LAYOUT))
    given = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) + 1, state.networks["tokenizer"].params)
    changed = with_params(state, "tokenizer", given)
    for params in (changed.networks["tokenizer"].params, changed.ema):
        jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.float32, given))
    assert jax.tree.map(lambda leaf: leaf.sharding, changed) == jax.tree.map(lambda leaf: leaf.sharding, state)
    assert changed.networks["tokenizer"].opt_state is state.networks["tokenizer"].opt_state


def test_only_the_variables_that_are_named_change():
    networks = {name: NetworkState({"w": 1}, {}, {"batch_stats": 0}) for name in ("a", "b")}
    state = TrainState(0, 0, networks, {}).with_variables({"b": {"batch_stats": 5}})
    assert state.networks["a"] == networks["a"]
    assert state.networks["b"].all_variables() == {"params": {"w": 1}, "batch_stats": 5}
