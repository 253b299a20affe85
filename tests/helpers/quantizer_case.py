"""Runs a quantizer on fixed latents, with gradients, on one device or on a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fvq_jax.models.quantizers.base import Quantized, Quantizer
from fvq_jax.runtime.mesh import BATCH, shardings
from tests.helpers.golden_case import relative_error


def random_latent(d: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal float32 latents [8, 2, 3, d]."""
    return (scale * np.random.default_rng(seed).normal(size=(8, 2, 3, d))).astype(np.float32)


def vector_weights(latent: np.ndarray) -> np.ndarray:
    """What the loss of `run` multiplies the vectors by."""
    return np.random.default_rng(9).normal(size=latent.shape).astype(np.float32)


def run(quantizer: Quantizer, latent: np.ndarray, params: Any = None) -> tuple[Quantized, Any]:
    """(output, gradients to latents and parameters) of sum(weights * vectors) + all weighted loss terms."""
    params = {} if params is None else params
    if quantizer.mesh is not None:
        layout = NamedSharding(quantizer.mesh, BATCH), shardings(params, quantizer.mesh, quantizer.rules)
        latent, params = jax.device_put((latent, params), layout)
    return _program(quantizer)(latent, params)


@functools.cache
def _program(quantizer):
    def loss(latent, params):
        output = quantizer.apply({"params": params}, latent)
        terms = sum(weight * output.losses[name] for name, weight in quantizer.loss_weights.items())
        return terms + jnp.sum(vector_weights(latent) * output.vectors), output

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)

    @jax.jit
    def output_and_gradients(latent, params):
        gradients, output = gradient(latent, params)
        return output, gradients

    return output_and_gradients


def assert_same(actual: tuple[Quantized, Any], expected: tuple[Quantized, Any], tolerance: float = 1e-5) -> None:
    """Equal codes; vectors, loss terms and gradients within a relative tolerance."""
    (output, gradients), (wanted, wanted_gradients) = actual, expected
    np.testing.assert_array_equal(output.codes, wanted.codes)
    np.testing.assert_allclose(output.vectors, wanted.vectors, atol=1e-6)
    assert output.losses.keys() == wanted.losses.keys()
    for name, loss in output.losses.items():
        np.testing.assert_allclose(loss, wanted.losses[name], rtol=tolerance)
    errors = jax.tree.map(relative_error, gradients, wanted_gradients)
    assert max(jax.tree.leaves(errors)) < tolerance, errors
