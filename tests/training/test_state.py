import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import path_name
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.state import NetworkState, TrainState, abstract_state, create_state
from tests.helpers.tiny import tiny_config


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
    task = TokenizerTask(tiny_config(**changes | small), mesh, 10, 1)
    return task, create_state(task.init, 0, mesh)


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
    task, state = real_state()
    announced = abstract_state(task.init, task.mesh)
    assert jax.tree.structure(announced) == jax.tree.structure(state)
    for expected, leaf in zip(jax.tree.leaves(announced), jax.tree.leaves(state), strict=True):
        assert isinstance(expected, jax.ShapeDtypeStruct)
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_the_real_state_starts_at_step_zero_with_float32_parameters():
    _, state = real_state()
    assert int(state.step) == int(state.skipped) == 0
    assert set(state.networks) == {"tokenizer", "discriminator"}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.networks["tokenizer"].params)
    assert state.networks["discriminator"].batch_stats
    assert state.networks["tokenizer"].batch_stats == {}


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)])
def test_the_mesh_changes_no_number(sizes):
    mesh = make_mesh(*sizes)
    state = create_state(small_init, 3, mesh)
    expected = jax.jit(small_init)(jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected)
    codebook = state.networks["tokenizer"].params["quantizer"]["codebook"]
    assert bytes_per_device(codebook) == {codebook.nbytes // sizes[1]}


def test_the_seed_decides():
    mesh = make_mesh(8, 1)
    states = [create_state(small_init, seed, mesh).ema["encoder"]["kernel"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(states[0], states[1])
    assert np.any(states[0] != states[2])


def test_the_codebook_is_never_whole_on_a_device():
    """The compiled initialisation holds row blocks only."""
    mesh = make_mesh(1, 8)

    def init(key):
        codebook = jax.random.uniform(key, (8 * 37, 11))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, {"tokenizer": NetworkState({"quantizer": {"codebook": codebook}}, {}, {})}, {})

    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, mesh))
    text = jax.jit(init, out_shardings=layout).lower(jax.random.key(0)).compile().as_text()
    assert "[37,11]" in text
    assert "[296,11]" not in text
