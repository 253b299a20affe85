import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.bsq import BSQuantizer
from tests.helpers.quantizer_case import assert_same, random_latent, run, vector_weights
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of

BITS = 5
OPTIONS = {"bits": BITS, "temperature": 0.2, "entropy_weight": 0.7}


def directions(latent):
    z = np.asarray(latent, np.float64).reshape(-1, BITS)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def entropy(p):
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def entropy_oracle(u, temperature):
    """Sec. 3.3 of arXiv 2406.07548 in float64: mean entropy minus entropy of the mean, over bits; and its gradient."""
    scale = 4 / (np.sqrt(BITS) * temperature)
    p = 1 / (1 + np.exp(-scale * u))
    mean = p.mean(axis=0)
    loss = entropy(p).sum(axis=1).mean() - entropy(mean).sum()
    slope = np.log((1 - p) / p) - np.log((1 - mean) / mean)
    return loss, slope * p * (1 - p) * scale / len(u)


def test_codes_vectors_loss_and_gradient_equal_the_formula():
    latent = random_latent(BITS)
    output, (to_latent, _) = run(BSQuantizer(**OPTIONS), latent)
    one = latent > 0
    np.testing.assert_array_equal(output.codes, one @ np.array([16, 8, 4, 2, 1]))
    np.testing.assert_allclose(output.vectors, np.where(one, 1, -1) / np.sqrt(BITS), rtol=1e-6)
    u = directions(latent)
    loss, to_direction = entropy_oracle(u, 0.2)
    assert list(output.losses) == ["entropy"]
    np.testing.assert_allclose(output.losses["entropy"], loss, rtol=1e-5)
    # The gradient to u passes on to z at a right angle to it, divided by |z|.
    whole = vector_weights(latent).reshape(-1, BITS) + 0.7 * to_direction
    across = whole - (whole * u).sum(axis=1, keepdims=True) * u
    wanted = across / np.linalg.norm(latent.reshape(-1, BITS), axis=1, keepdims=True)
    assert np.abs(0.7 * to_direction).max() > 1e-3
    np.testing.assert_allclose(to_latent.reshape(-1, BITS), wanted, atol=1e-5)


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same(sizes):
    latent = random_latent(BITS)
    assert_same(run(BSQuantizer(**OPTIONS, mesh=mesh_of(*sizes)), latent), run(BSQuantizer(**OPTIONS), latent))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_temperature_is_used(temperature):
    latent = random_latent(BITS)
    loss = run(BSQuantizer(bits=BITS, temperature=temperature), latent)[0].losses["entropy"]
    np.testing.assert_allclose(loss, entropy_oracle(directions(latent), temperature)[0], rtol=1e-4)


def test_defaults_and_what_it_says_of_itself():
    quantizer = BSQuantizer()
    assert quantizer.loss_weights == {"entropy": 0.1}
    assert (quantizer.size, quantizer.latent_dim, quantizer.temperature) == (2**18, 18, 1.0)
    assert quantizer.description == "BSQ, the signs of unit-length latents"


def test_a_latent_of_zeros_has_code_zero_and_finite_gradients():
    output, (to_latent, _) = run(BSQuantizer(**OPTIONS), np.zeros((8, 1, 1, BITS), np.float32))
    assert not np.any(output.codes)
    assert np.all(np.isfinite(to_latent))
    np.testing.assert_allclose(np.linalg.norm(output.vectors, axis=-1), 1, rtol=1e-6)


def test_the_last_channel_counts_one():
    codes = BSQuantizer(bits=3).apply({}, jnp.array([[[[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]]]), method="encode")
    np.testing.assert_array_equal(codes[0, 0], [1, 4])
