"""The entropy terms of codes whose bits are independent, given the log-odds of every bit.

The probability of a code is the product of those of its bits. So the entropy of a token is the sum over its bits; only
the mean probability of every code, over tokens, needs an array as long as the number of codes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from fvq_jax.ops.sharded_codebook import TOKENS

BLOCK_SIZE = 4096  # tokens per block: 8 MiB of probabilities for half of 18 bits
PRODUCTS = 4  # of the halves' probabilities, one for the value and three for the gradient
AXES = ("data", "codebook")


def joint_entropy_loss(
    logits: Float[Array, "n bits"], *, mesh: Mesh | None = None, block_size: int = BLOCK_SIZE
) -> Float[Array, ""]:
    """Mean entropy of a token's code minus the entropy of the mean distribution over all 2^bits codes, in nats.

    See `mean_code_probabilities` for sizes and precision. Source: arXiv 2310.05737, Eq. 4; the mean is over the tokens
    of all devices, before its logarithm is taken, and no constant is added in the logarithm.
    """
    return _token_entropy(logits) - _entropy(mean_code_probabilities(logits, mesh=mesh, block_size=block_size))


def bitwise_entropy_loss(logits: Float[Array, "n bits"]) -> Float[Array, ""]:
    """Mean entropy of a token's code minus the summed entropies of the mean of every bit, in nats.

    float32. Under `jit` the means are over the tokens of all devices. Source: arXiv 2406.07548, sec. 3.3.
    """
    # Both probabilities from the logits, since 1 - p has few digits if p is near 1.
    mean = jnp.stack([jax.nn.sigmoid(x).mean(axis=0) for x in (logits, -logits)])
    return _token_entropy(logits) - _entropy(mean)


def mean_code_probabilities(
    logits: Float[Array, "n bits"], *, mesh: Mesh | None = None, block_size: int = BLOCK_SIZE
) -> Float[Array, "k"]:
    """The probability of each of the 2^bits codes, mean over all tokens; bit i counts 2^i in a code.

    The probabilities of the lower and of the upper half of the bits are made for one block of tokens after another, and
    their product, a matrix, is added up. The largest temporaries are [block_size, 2^(bits/2)] and the result. On a mesh
    with axes `data` and `codebook`, n must be a multiple of the number of devices, and every device visits its own
    tokens. float32 at HIGHEST precision; the gradient is exact and makes the probabilities anew.
    """

    def total(logits):
        local = _summed_probabilities(logits, block_size, mesh)
        return local if mesh is None else jax.lax.psum(local, AXES)

    run = total if mesh is None else jax.shard_map(total, mesh=mesh, in_specs=TOKENS, out_specs=PartitionSpec())
    return run(logits).reshape(-1) / len(logits)


def _summed_probabilities(logits, block_size, mesh):
    """Sum over the tokens of one device: rows are the upper bits, columns the lower bits."""
    n, bits = logits.shape
    size = min(block_size, n)
    padding = -n % size
    real = jnp.pad(jnp.ones(n), (0, padding)).reshape(-1, size)
    blocks = jnp.pad(logits, ((0, padding), (0, 0))).reshape(-1, size, bits)

    @jax.checkpoint
    def product(block, real):
        lower, upper = _probabilities(block[:, : bits // 2]), _probabilities(block[:, bits // 2 :])
        return jnp.matmul(upper.T * real[None], lower, precision=jax.lax.Precision.HIGHEST)

    zero = jnp.zeros((2 ** (bits - bits // 2), 2 ** (bits // 2)))
    if mesh is not None:
        zero = jax.lax.pcast(zero, AXES, to="varying")
    total, _ = jax.lax.scan(lambda total, block: (total + product(*block), None), zero, (blocks, real))
    return total


def _probabilities(logits):
    """Of every combination of these bits, [n, 2^bits]; bit i counts 2^i."""

    def with_bit(so_far, logit):
        off, on = (jax.nn.sigmoid(x)[:, None] for x in (-logit, logit))
        return jnp.concatenate([so_far * off, so_far * on], axis=1)

    return functools.reduce(with_bit, logits.T, jnp.ones((len(logits), 1)))


def _token_entropy(logits):
    """Sum over bits, mean over tokens. All terms are positive, so no digits are lost where a bit is nearly sure."""
    size = jnp.abs(logits)
    return jnp.mean(jnp.sum(jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size), axis=1))


def _entropy(p):
    # The bound keeps the gradient finite where a probability is 0.
    return -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny)))
