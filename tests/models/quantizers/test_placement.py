"""Codes that are put onto latents, at the start and when they are not chosen for some steps, and follow them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.runtime.mesh import global_batch
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.state import create_state
from fvq_jax.training.step import TrainStep
from tests.helpers.same_bits import assert_same_bits
from tests.helpers.tiny import random_images, tiny_config
from tests.helpers.tiny_generator import mesh_of

K, D, AFTER = 64, 4, 2  # steps of 32 tokens, so 64 tokens, which is 1 per code
KINDS = {
    "vector": {"bridge": "XS/2-d1"},
    "ibq": {"bridge": "linear"},
    "residual": {"bridge": "none", "depth": 2},
    "multi_scale": {"bridge": "none", "scales": (1, 2, 4), "phi_count": 1},
}


def make(name, **options):
    return make_quantizer({"name": name, "codebook_size": K, "code_dim": D, "restart_after": 1.0} | options)


def latents(step, images=2):
    return jnp.asarray(np.random.default_rng(step).normal(size=(images, 4, 4, D)), jnp.float32)


@functools.cache
def steps(name, images=2):
    """[(latents, table before, output, state after)] of six training steps whose parameters stay as they are."""
    quantizer = make(name, **KINDS[name])
    variables = jax.jit(quantizer.init)(jax.random.key(0), latents(0, images))
    state, found = {"placement": variables["placement"]}, []

    @jax.jit
    def step(latent, state, key):
        variables_now = {"params": variables["params"], **state}
        table = quantizer.apply(variables_now, method="table")
        return table, *quantizer.apply(variables_now, latent, train=True, key=key, mutable=["placement"])

    for number in range(6):
        latent = latents(number, images)
        table, output, state = step(latent, state, jax.random.key(number))
        found.append((np.asarray(latent), np.asarray(table), output, jax.device_get(state["placement"]["placement"])))
    return found


def distances(rows, latent):
    """To the nearest latent, and which one that is."""
    squares = np.square(rows[:, None] - latent.reshape(1, -1, D)).sum(axis=2)
    return squares.min(axis=1) ** 0.5, squares.argmin(axis=1)


@pytest.mark.parametrize("name", ["vector", "ibq"])
def test_the_first_steps_put_every_code_onto_a_latent_of_its_own(name):
    """32 latents in a step, so half of the 64 codes, in the order of the rows."""
    for number in range(2):
        latent, table = steps(name)[number][0], steps(name)[number + 1][1]
        rows = table[32 * number : 32 * (number + 1)]
        distance, which = distances(rows, latent)
        assert distance.max() < 1e-5
        assert len(set(which)) == 32
    assert len(np.unique(steps(name)[2][1].round(4), axis=0)) == K


def test_with_more_patience_fewer_codes_have_their_turn_in_a_step():
    """All 64 in half the time, that is, in 4 tokens per code, which are 8 steps."""
    quantizer = make("vector", bridge="none", restart_after=8.0)
    variables = quantizer.init(jax.random.key(0), latents(0))
    _, state = quantizer.apply(variables, latents(0), train=True, key=jax.random.key(0), mutable=["placement"])
    np.testing.assert_array_equal(np.any(state["placement"]["placement"]["offset"], axis=1), np.arange(K) < 8)
    assert state["placement"]["placement"]["next_row"] == 8


def test_later_only_codes_move_that_were_not_chosen_for_some_steps_and_whose_turn_it_is():
    unused, row, moved, offset = np.full(K, -1), 0, [], np.zeros((K, D))
    for (latent, _, output, state), (_, after, _, _) in itertools.pairwise(steps("vector")):
        hit = np.bincount(np.ravel(output.codes), minlength=K) > 0
        again = ((np.arange(K) - row) % K < 32) & ((unused == -1) | (~hit & (unused >= AFTER)))
        unused = np.where(again, 0, np.where(unused == -1, -1, np.where(hit, 0, np.minimum(unused + 1, AFTER))))
        row = (row + 32) % K
        np.testing.assert_array_equal(state["unused"], unused)
        assert state["next_row"] == row
        np.testing.assert_array_equal(state["offset"][~again], offset[~again])
        offset = state["offset"]
        assert distances(after[again], latent)[0].max(initial=0) < 1e-5
        moved.append(int(again.sum()))
    assert moved[:2] == [32, 32]
    assert 0 < moved[-1] < 32


@pytest.mark.parametrize("name", ["residual", "multi_scale"])
def test_with_levels_codes_start_on_what_the_levels_before_have_left(name):
    """At first hardly anything is taken away, since all codes are near zero."""
    latent, rows = steps(name)[0][0], steps(name)[1][1]
    assert distances(rows, latent)[0].max() < 0.1
    assert len(np.unique(rows.round(1), axis=0)) > 16


def test_codes_move_and_spread_as_the_latents_do():
    """By the mean and the symmetric root of the covariance, averaged over 1, then 9 of 10, then 9 of 11 shares."""
    mean, covariance = np.zeros(D), np.eye(D)
    for number, (latent, _, _, state) in enumerate(steps("vector")):
        tokens = np.float64(latent).reshape(-1, D)
        share = 9 / (number + 9)
        mean = mean + share * (tokens.mean(axis=0) - mean)
        covariance = covariance + share * (np.cov(tokens.T, bias=True) - covariance)
        np.testing.assert_allclose(state["mean"], mean[None], atol=1e-5)
        np.testing.assert_allclose(state["covariance"], covariance, atol=1e-5)
        np.testing.assert_allclose(state["root"] @ state["root"], covariance, atol=1e-5)
        np.testing.assert_allclose(state["root"], state["root"].T, atol=1e-6)
    quantizer = make("vector", **KINDS["vector"])
    variables = quantizer.init(jax.random.key(0), latents(0))
    bridged = quantizer.apply({"params": variables["params"]} | {"placement": {"placement": state}}, method="bridged")
    table = quantizer.apply({"params": variables["params"]} | {"placement": {"placement": state}}, method="table")
    np.testing.assert_allclose(table, mean[None] + (bridged + state["offset"]) @ state["root"], atol=1e-4)


def test_latents_of_a_plane_are_no_problem():
    quantizer = make("vector", bridge="none")
    variables = quantizer.init(jax.random.key(0), latents(0))
    flat = latents(0).at[..., 2:].set(3.0)
    _, state = quantizer.apply(variables, flat, train=True, key=jax.random.key(0), mutable=["placement"])
    rows = quantizer.apply(variables | state, method="table")[:32]
    assert distances(np.asarray(rows), np.asarray(flat))[0].max() < 1e-4


def test_without_it_there_is_no_state_and_codes_start_as_published():
    quantizer = make("vector", bridge="XS/2-d1", restart_after=0.0)
    variables = quantizer.init(jax.random.key(0), latents(0))
    assert list(variables) == ["params"]
    assert not np.any(quantizer.apply(variables, method="table"))


def test_training_needs_a_key():
    quantizer = make("vector", bridge="none")
    variables = quantizer.init(jax.random.key(0), latents(0))
    with pytest.raises(ValueError, match="restart_after > 0 draws random latents: give a key"):
        quantizer.apply(variables, latents(0), train=True, mutable=["placement"])


def test_unit_length_codes_start_on_unit_length_latents():
    quantizer = make("vector", bridge="none", l2_normalize=True)
    variables = quantizer.init(jax.random.key(0), latents(0, 4))
    _, state = quantizer.apply(variables, latents(0, 4), train=True, key=jax.random.key(0), mutable=["placement"])
    table = quantizer.apply(variables | state, method="table")
    unit = np.asarray(latents(0, 4)) / np.linalg.norm(latents(0, 4), axis=-1, keepdims=True)
    assert distances(np.asarray(table), unit)[0].max() < 1e-5


@pytest.mark.slow
def test_codes_of_a_trained_tokenizer_keep_their_places():
    """All codes are chosen again and again, by latents that they are equal to."""
    settings = {"tokenizer.ch_mult": (1,), "data.image_size": 8, "tokenizer.quantizer.restart_after": 1}

    def unused(**changes):
        variables = TokenizerTask(tiny_config(**settings, **changes), mesh_of(1, 1)).init(jax.random.key(0))
        return np.unique(variables["tokenizer"]["placement"]["quantizer"]["placement"]["unused"])

    assert unused() == [-1]
    assert unused(init_from="trained.safetensors") == [0]
    quantizer = make("vector", bridge="none", init_std=1.0)
    fresh = quantizer.init(jax.random.key(0), latents(0))
    state = quantizer.state_of_trained({"placement": fresh["placement"]})
    codebook = fresh["params"]["codebook"]
    for number in range(4):
        latent = codebook.reshape(4, 4, 4, D)
        key = jax.random.key(number)
        _, state = quantizer.apply({**fresh, **state}, latent, train=True, key=key, mutable=["placement"])
    table = quantizer.apply({**fresh, **state}, method="table")
    np.testing.assert_allclose(table, codebook, atol=1e-4)
    assert np.any(state["placement"]["placement"]["mean"])  # the frame is there


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path):
    config = tiny_config(**{"tokenizer.ch_mult": (1,), "data.image_size": 8, "tokenizer.quantizer.restart_after": 1})
    mesh = mesh_of(1, 1)
    step = TrainStep.of(TokenizerTask(config, mesh), config, mesh, 10, 0)
    state = create_state(step.init, 0, step.abstract())
    run = jax.jit(step.__call__, compiler_options={"xla_backend_optimization_level": 0})

    def after(state, number):
        return run(state, global_batch({"image": random_images(16, 8, number)}, mesh), {})[0]

    state = after(after(state, 0), 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, 2, {})
        checkpoints.wait()
        restored = checkpoints.restore(step.abstract()).state
    whole, parts = after(state, 2), after(restored, 2)
    assert_same_bits(whole, parts)
    assert np.any(whole.networks["tokenizer"].variables["placement"]["quantizer"]["placement"]["offset"])
