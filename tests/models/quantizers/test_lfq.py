import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.lfq import LFQuantizer
from tests.helpers.quantizer_case import assert_same, random_latent, run, vector_weights
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of

BITS = 5
OPTIONS = {"bits": BITS, "temperature": 2.0, "entropy_weight": 0.7, "commitment_weight": 0.4}
ALL_CODES = np.array([code[::-1] for code in itertools.product((-1.0, 1.0), repeat=BITS)])  # the first bit is lowest


def entropy_oracle(latent, temperature):
    """Eq. 4 of arXiv 2310.05737 with the probabilities of all codes at once, float64; and its gradient."""
    z = np.asarray(latent, np.float64).reshape(-1, BITS)
    logits = 2 * z @ ALL_CODES.T / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    loss = -(p * log_p).sum(axis=1).mean() + (mean * np.log(mean)).sum()
    to_p = (np.log(mean)[None] - log_p) / len(z)
    to_logits = p * (to_p - (p * to_p).sum(axis=1, keepdims=True))
    return loss, (2 / temperature * to_logits @ ALL_CODES).reshape(latent.shape)


def test_codes_vectors_losses_and_gradient_equal_the_formula():
    latent = random_latent(BITS)
    output, (to_latent, _) = run(LFQuantizer(**OPTIONS), latent)
    signs = np.where(latent > 0, 1, -1)
    np.testing.assert_array_equal(output.vectors, signs)
    np.testing.assert_array_equal(ALL_CODES[np.asarray(output.codes)], signs)
    assert sorted(output.losses) == ["commitment", "entropy"]
    entropy, to_entropy = entropy_oracle(latent, 2.0)
    np.testing.assert_allclose(output.losses["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(output.losses["commitment"], np.mean(np.square(latent - signs)), rtol=1e-5)
    wanted = vector_weights(latent) + 0.7 * to_entropy + 0.4 * 2 * (latent - signs) / latent.size
    assert np.abs(0.7 * to_entropy).max() > 1e-3
    np.testing.assert_allclose(to_latent, wanted, atol=2e-6)


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same(sizes):
    latent = random_latent(BITS)
    assert_same(run(LFQuantizer(**OPTIONS, mesh=mesh_of(*sizes)), latent), run(LFQuantizer(**OPTIONS), latent))


def test_the_temperature_and_its_default_are_used():
    latent = random_latent(BITS, scale=0.02)
    cold = run(LFQuantizer(bits=BITS), latent)[0].losses["entropy"]
    np.testing.assert_allclose(cold, entropy_oracle(latent, 0.01)[0], rtol=1e-5)
    assert abs(cold - entropy_oracle(latent, 0.02)[0]) > 1e-2


def test_weights_bits_and_what_it_says_of_itself():
    quantizer = LFQuantizer()
    assert quantizer.loss_weights == {"commitment": 0.25, "entropy": 0.1}
    assert (quantizer.size, quantizer.latent_dim) == (2**18, 18)
    assert quantizer.description == "LFQ, the signs of latents"
    assert LFQuantizer(**OPTIONS).loss_weights == {"commitment": 0.4, "entropy": 0.7}


def test_zero_becomes_minus_one_and_the_first_channel_counts_one():
    output = LFQuantizer(bits=3).apply({}, jnp.array([[[[0.0, -0.0, 0.0], [1e-30, 0, 0], [0, 0, 5]]]]))
    np.testing.assert_array_equal(output.codes[0, 0], [0, 1, 4])
    np.testing.assert_array_equal(output.vectors[0, 0], [[-1, -1, -1], [1, -1, -1], [-1, -1, 1]])


def test_equals_vector_quantize_pytorch():
    """Its first channel is the highest bit, and its logarithms take no probability below 1e-5: there is none here."""
    library = pytest.importorskip("vector_quantize_pytorch")
    torch = pytest.importorskip("torch")
    latent = random_latent(BITS, scale=0.3)
    theirs = library.LFQ(dim=BITS, codebook_size=2**BITS, entropy_loss_weight=0.7, commitment_loss_weight=0.4)
    theirs.train()
    given = torch.from_numpy(latent.reshape(1, -1, BITS))
    (vectors, codes, _), losses = theirs(given, inv_temperature=0.5, return_loss_breakdown=True)
    output, _ = run(LFQuantizer(**OPTIONS), latent)
    np.testing.assert_array_equal(np.asarray(output.vectors).reshape(-1, BITS), vectors.detach().numpy()[0].round(5))
    reversed_bits = [int(f"{code:0{BITS}b}"[::-1], 2) for code in codes.numpy().ravel()]
    np.testing.assert_array_equal(np.asarray(output.codes).ravel(), reversed_bits)
    entropy = losses.per_sample_entropy.item() - losses.batch_entropy.item()
    np.testing.assert_allclose(output.losses["entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(output.losses["commitment"], losses.commitment.item(), rtol=1e-5)


def test_flops_of_the_entropy_term_are_not_counted():
    """One block of tokens of four is counted, of each of four products."""
    quantizer = LFQuantizer(bits=10)
    assert quantizer.uncounted_flops(4 * 4096, "tpu") == (4 * 2 * 4 * 4096 * 1024 * 3 / 4, 6)
    assert quantizer.uncounted_flops(4 * 4096, "cpu")[1] == 1
    assert LFQuantizer(bits=10, entropy_weight=0.0).uncounted_flops(4 * 4096, "tpu") == (0, 1)
