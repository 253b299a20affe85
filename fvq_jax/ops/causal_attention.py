"""Attention of every position to itself and those before, in blocks of queries."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fvq_jax.ops.matmul import matmul_precision

# Queries of a block are a multiple of this, as the matrix unit of most TPUs wants it. On a CPU 64 are hardly faster.
QUERIES = 128
BLOCKS = 8  # at most, since each takes time to compile; more would spare less than another 1/16 of the scores


def causal_attention(
    q: Float[Array, "b t h c"], k: Float[Array, "b t h c"], v: Float[Array, "b t h c"]
) -> Float[Array, "b t h c"]:
    """The values at a position and those before, weighted by softmax(q k / sqrt(c)), in each of h heads.

    A block of queries is multiplied with the keys up to its last position only, which spares nearly half of the scores
    of a long sequence (`scored_pairs`). Scores and softmax are float32; weights and result have the dtype of all three.
    """
    return jnp.concatenate([_of_block(q, k, v, start, end) for start, end in _blocks(q.shape[1])], axis=1)


def scored_pairs(length: int) -> int:
    """How many pairs of a query and a key get a score in a sequence of this length."""
    return sum((end - start) * end for start, end in _blocks(length))


def _blocks(length):
    """The first query of every block and the one after its last."""
    size = QUERIES * math.ceil(length / (BLOCKS * QUERIES))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _of_block(q, k, v, start, end):
    q, k, v = q[:, start:end], k[:, :end], v[:, :end]
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("bqhc,bkhc->bhqk", q, k, precision=precision, preferred_element_type=jnp.float32)
    seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
    scores = jnp.where(seen[None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhc->bqhc", weights, v, precision=precision)
