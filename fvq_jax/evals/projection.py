"""The plane in which a codebook is widest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def principal_plane(codebook: Float[Array, "k d"]) -> tuple[Float[Array, "k 2"], Float[Array, "2"]]:
    """The codes on their two principal axes, about their mean, and the share of the variance along each.

    Exact and the same every time: eigenvectors of the covariance, their largest component positive.
    A codebook of one dimension has a second axis of zeros. Pure, to be jitted; rows may be sharded.
    """
    if codebook.shape[1] == 1:
        codebook = jnp.pad(codebook, ((0, 0), (0, 1)))
    centred = codebook - jnp.mean(codebook, axis=0, keepdims=True)
    highest = jax.lax.Precision.HIGHEST
    covariance = jnp.matmul(centred.T, centred, precision=highest) / codebook.shape[0]
    values, vectors = jnp.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, :2]
    largest = jnp.take_along_axis(axes, jnp.argmax(jnp.abs(axes), axis=0, keepdims=True), axis=0)
    axes = axes * jnp.sign(largest)
    share = values[::-1][:2] / jnp.maximum(jnp.sum(values), jnp.finfo(jnp.float32).tiny)
    return jnp.matmul(centred, axes, precision=highest), share
