import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.simvq import SimVQuantizer
from tests.helpers.golden_case import relative_error
from tests.helpers.quantizer_case import random_latent, vector_weights

K, D = 64, 8
LATENT = jnp.asarray(random_latent(D))


def make(**options):
    return SimVQuantizer(**{"codebook_size": K, "code_dim": D, **options})


@functools.cache
def start():
    return jax.jit(make().init)(jax.random.key(0), LATENT)


@functools.cache
def oracle():
    """Codes, chosen rows, and the gradients of the layer of 0.7 codebook + 0.25 commitment; float64."""
    book = np.float64(start()["fixed"]["codebook"])
    layer = start()["params"]["layer"]
    table = book @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    z = np.float64(LATENT).reshape(-1, D)
    codes = np.argmin(np.linalg.norm(z[:, None] - table[None], axis=2), axis=1)
    to_rows = 0.7 * 2 * (table[codes] - z) / z.size
    return codes, table[codes], {"kernel": book[codes].T @ to_rows, "bias": to_rows.sum(axis=0)}


def test_codes_losses_and_gradients_equal_the_formula():
    quantizer = make(codebook_weight=0.7)

    def loss(params, latent):
        output = quantizer.apply({**start(), "params": params}, latent)
        terms = sum(weight * output.losses[name] for name, weight in quantizer.loss_weights.items())
        return terms + jnp.sum(vector_weights(LATENT) * output.vectors), output

    (to_params, to_latent), output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(start()["params"], LATENT)
    codes, chosen, to_layer = oracle()
    np.testing.assert_array_equal(np.asarray(output.codes).ravel(), codes)
    np.testing.assert_allclose(np.asarray(output.vectors).reshape(-1, D), chosen, atol=1e-5)
    square = np.mean((LATENT.reshape(-1, D) - chosen) ** 2)
    np.testing.assert_allclose([output.losses["codebook"], output.losses["commitment"]], square, rtol=1e-5)
    assert max(jax.tree.leaves(jax.tree.map(relative_error, dict(to_params["layer"]), to_layer))) < 1e-5
    pull = 0.25 * 2 * (LATENT - chosen.reshape(LATENT.shape)) / LATENT.size
    np.testing.assert_allclose(to_latent, vector_weights(LATENT) + pull, atol=1e-5)


def test_the_vectors_are_normal_and_not_trained_and_the_layer_starts_uniform():
    big = jax.jit(make(codebook_size=4096).init)(jax.random.key(1), LATENT)
    assert set(big) == {"fixed", "params"}
    assert set(big["params"]) == {"layer"}
    np.testing.assert_allclose(np.std(big["fixed"]["codebook"]), D**-0.5, rtol=0.02)
    small = jax.jit(make(codebook_size=4096, init_std=1e-3).init)(jax.random.key(1), LATENT)
    np.testing.assert_allclose(np.std(small["fixed"]["codebook"]), 1e-3, rtol=0.02)
    for leaf in jax.tree.leaves(big["params"]):
        assert np.abs(leaf).max() <= D**-0.5
        assert np.abs(leaf).max() > 0.7 * D**-0.5


def test_it_equals_the_package_that_is_used_most():
    """vector-quantize-pytorch has no bias, and scales its commitment loss as the other term: both are named here."""
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("vector_quantize_pytorch")
    peer = published.SimVQ(
        dim=D, codebook_size=K, rotation_trick=False, commitment_weight=1.0, input_to_quantize_commit_loss_weight=0.25
    )
    kernel = np.asarray(start()["params"]["layer"]["kernel"])
    peer.frozen_codebook.copy_(torch.from_numpy(np.array(start()["fixed"]["codebook"])))
    with torch.no_grad():
        peer.code_transform.weight.copy_(torch.from_numpy(kernel.T.copy()))
    variables = {**start(), "params": {"layer": {"kernel": kernel, "bias": np.zeros(D, np.float32)}}}
    output = make().apply(variables, LATENT)
    quantized, codes, loss = peer(torch.from_numpy(np.array(LATENT).reshape(8, 6, D)))
    np.testing.assert_array_equal(np.asarray(output.codes).reshape(8, 6), codes.numpy())
    np.testing.assert_allclose(np.asarray(output.vectors).reshape(8, 6, D), quantized.detach().numpy(), atol=1e-5)
    ours = sum(weight * output.losses[name] for name, weight in make().loss_weights.items())
    np.testing.assert_allclose(ours, loss.detach().numpy().item(), rtol=1e-5)


def test_it_is_described_by_its_name_and_sizes():
    assert make().description == "SimVQ"
    assert make().architecture() == {"codebook_size": K, "code_dim": D}
    assert dict(make(codebook_weight=0.5, commitment_weight=0.1).loss_weights) == {"codebook": 0.5, "commitment": 0.1}
    with pytest.raises(ValueError, match="SimVQ has no classes: leave condition out"):
        make().apply(start(), 1, method="table")
