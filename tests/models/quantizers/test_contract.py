"""What every quantizer owes, whatever it is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers import QUANTIZERS, make_quantizer, quantizer_settings
from fvq_jax.models.tokenizer import quantization_error
from fvq_jax.ops.estimators import ESTIMATORS
from fvq_jax.runtime.fields import settings_of

SIDE = 4
TINY = {
    "vector": {"codebook_size": 16, "code_dim": 6, "bridge": "linear", "init_std": 1.0},
    "residual": {"codebook_size": 16, "code_dim": 6, "bridge": "none", "init_std": 1.0, "depth": 3},
    "multi_scale": {
        "codebook_size": 16,
        "code_dim": 6,
        "bridge": "none",
        "init_std": 1.0,
        "scales": (1, 2, 4),
        "phi_count": 2,
    },
    "ema": {"codebook_size": 16, "code_dim": 6},
    "simvq": {"codebook_size": 16, "code_dim": 6},
    "fsq": {"levels": (5, 4, 3)},
    "lfq": {"bits": 5},
    "bsq": {"bits": 5},
    "ibq": {"codebook_size": 16, "code_dim": 6},
}
every = pytest.mark.parametrize("name", list(QUANTIZERS))


@functools.cache
def case(name):
    """(quantizer, its variables, latents, what it makes of them)"""
    quantizer = make_quantizer({"name": name, **TINY[name]})
    latent = jnp.asarray(np.random.default_rng(0).normal(size=(3, SIDE, SIDE, quantizer.latent_dim)), jnp.float32)
    variables = jax.jit(quantizer.init)(jax.random.key(0), latent)
    return quantizer, variables, latent, jax.jit(quantizer.apply)(variables, latent)


def test_all_are_tried():
    assert set(TINY) == set(QUANTIZERS)


@every
def test_codes_have_the_shape_that_it_names(name):
    quantizer, _, _, output = case(name)
    shape = quantizer.code_shape(SIDE, SIDE)
    assert output.codes.shape == (3, *shape)
    assert output.codes.dtype == jnp.int32
    assert 0 <= output.codes.min() <= output.codes.max() < quantizer.size
    assert quantizer.grid(shape) == (SIDE, SIDE)
    for wrong in ((), (0, *shape[1:]), (*shape, 2)):
        with pytest.raises(ValueError, match=r"codes must be \[b, "):
            quantizer.grid(wrong)


@every
def test_every_code_belongs_to_a_level_and_is_counted_there(name):
    quantizer, _, _, output = case(name)
    levels = max(len(quantizer.level_names), 1)
    level_of = quantizer.level_of(SIDE, SIDE)
    assert level_of.shape == quantizer.code_shape(SIDE, SIDE)
    assert set(level_of.ravel()) == set(range(levels))
    counts = quantizer.counts(output.codes)
    assert counts.shape == (levels, quantizer.size)
    codes = np.asarray(output.codes)
    for level in range(levels):
        own = codes[:, level_of == level].ravel()
        np.testing.assert_array_equal(counts[level], np.bincount(own, minlength=quantizer.size))


@every
def test_every_code_has_a_position(name):
    quantizer = case(name)[0]
    np.testing.assert_array_equal(quantizer.positions(), np.zeros(quantizer.size))


@every
def test_encoding_and_decoding_are_the_two_halves_of_a_call(name):
    quantizer, variables, latent, output = case(name)
    np.testing.assert_array_equal(quantizer.apply(variables, latent, method="encode"), output.codes)
    decoded = quantizer.apply(variables, output.codes, method="decode")
    np.testing.assert_allclose(decoded, output.vectors, atol=1e-6)
    assert set(output.losses) == set(quantizer.loss_weights)
    assert all(np.isfinite(loss) and jnp.shape(loss) == () for loss in output.losses.values())


@every
def test_the_quantization_error_is_measured_where_latents_are_compared(name):
    """No other code is nearer, on the average, than the one that was chosen."""
    quantizer, variables, latent, output = case(name)
    compared = quantizer.compared(latent)
    assert compared.shape == latent.shape
    error, power = quantization_error(compared, output.vectors)
    assert error.shape == power.shape == (3,)
    others = jnp.roll(output.codes, 1, axis=0)
    wrong, _ = quantization_error(compared, quantizer.apply(variables, others, method="decode"))
    assert np.all(error < wrong)


@every
def test_its_settings_make_it_again_and_it_is_described(name):
    quantizer, _, _, _ = case(name)
    settings = quantizer_settings(quantizer)
    assert make_quantizer(settings) == quantizer
    assert set(quantizer.architecture()) <= set(settings)
    assert quantizer.description
    quantizer.check()
    flops, passes = quantizer.uncounted_flops(128, "cpu")
    assert math.isfinite(flops)
    assert passes >= 1


@pytest.mark.parametrize("name", [name for name, kind in QUANTIZERS.items() if "estimator" in settings_of(kind)])
def test_the_estimator_decides_the_gradient_alone(name):
    _, variables, latent, output = case(name)
    found = {}
    for estimator in ESTIMATORS:
        other = make_quantizer({"name": name, **TINY[name], "estimator": estimator})

        def loss(latent, other=other):
            vectors = other.apply(variables, latent).vectors
            return jnp.sum(vectors * jnp.arange(vectors.size).reshape(vectors.shape)), vectors

        found[estimator], vectors = jax.jit(jax.grad(loss, has_aux=True))(latent)
        np.testing.assert_allclose(vectors, output.vectors, atol=1e-6)
        expected = ESTIMATORS[estimator]
        own = jax.grad(
            lambda z, passed=expected: jnp.sum(passed(z, output.vectors) * jnp.arange(z.size).reshape(z.shape))
        )
        np.testing.assert_allclose(found[estimator], own(latent), rtol=1e-3, atol=1e-2)
    assert np.abs(found["rotation"] - found["straight_through"]).max() > 1
