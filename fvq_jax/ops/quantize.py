"""The arithmetic of vector quantization around the search: straight-through estimate and loss terms."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fvq_jax.ops.nearest import l2_normalize

ENTROPY_BLOCK = 512  # tokens whose probabilities over all codes exist at one time


def straight_through(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """The value of `z_q` with the gradient of `z` (identity); none reaches `z_q`. arXiv 1711.00937, sec. 3.2."""
    return z + jax.lax.stop_gradient(z_q - z)


def codebook_loss(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, ""]:
    """Mean over all elements of |sg(z) - z_q|^2: pulls codes (through the bridge) to their latents."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(z) - z_q))


def commitment_loss(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, ""]:
    """Mean over all elements of |z - sg(z_q)|^2, unweighted: pulls latents to their codes."""
    return jnp.mean(jnp.square(z - jax.lax.stop_gradient(z_q)))


def entropy_loss(
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    *,
    temperature: float,
    normalize: bool = False,
    block_size: int = ENTROPY_BLOCK,
) -> Float[Array, ""]:
    """Entropy of each token's soft assignment (mean over tokens) less the entropy of the mean assignment.

    Assignments are softmax(-|z - e|^2 / temperature). Lower means each token is surer while the batch uses more
    codes; gradients reach latents and codes. Tokens are visited in blocks that are recomputed in the backward
    pass, so the largest temporary is [block_size, k]. float32 at HIGHEST precision; 1e-5 inside the logarithm
    of the mean as in the published code. Source: arXiv 2310.05737, Eq. 4, with squared distances.
    """
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    if normalize:
        z, codebook = l2_normalize(z), l2_normalize(codebook)
    n = z.shape[0]
    block_size = min(block_size, n)
    blocks = -(-n // block_size)
    valid = jnp.arange(blocks * block_size) < n
    z = jnp.pad(z, ((0, blocks * block_size - n), (0, 0)))
    squared_norm = jnp.sum(codebook * codebook, axis=1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total, block):
        z, valid = block
        product = jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
        distance = jnp.sum(z * z, axis=1, keepdims=True) + squared_norm[None] - 2 * product
        log_p = jax.nn.log_softmax(-distance / temperature, axis=1)
        p = jnp.where(valid[:, None], jnp.exp(log_p), 0.0)
        sure, used = total
        return (sure - jnp.sum(p * log_p), used + p.sum(axis=0)), None

    start = (jnp.zeros((), jnp.float32), jnp.zeros(codebook.shape[0], jnp.float32))
    # Strided blocks: every device of a sharded batch keeps its own tokens.
    inputs = z.reshape(block_size, blocks, -1).swapaxes(0, 1), valid.reshape(block_size, blocks).T
    (token_entropy, used), _ = jax.lax.scan(step, start, inputs)
    mean_p = used / n
    return token_entropy / n + jnp.sum(mean_p * jnp.log(mean_p + 1e-5))
