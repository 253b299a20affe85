"""Attention of all positions to all. On a CPU scores are made for a block of queries at a time."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Scores of an image, queries x keys, that are held at once on a GPU or TPU: 64 MiB in float32. Up to 64 x 64 positions,
# which are more than any training here has, that is all of them.
SCORES = 1 << 24
# Queries of a block on a CPU: 5 times as fast as all at once for 1,024 or 4,096 positions in 4 heads.
QUERIES = 64


@functools.partial(jax.jit, static_argnames=("divided", "limit"), inline=True)
def attention(
    q: Float[Array, "b n h c"],
    k: Float[Array, "b n h c"],
    v: Float[Array, "b n h c"],
    *,
    divided: bool = False,
    limit: int | float = SCORES,
) -> Float[Array, "b n h c"]:
    """The values at all positions, weighted by softmax(q k / sqrt(c)), in each of h heads; softmax in float32.

    A block of queries sees all keys, so nothing is approximated. The backward pass makes the scores of a block again.
    There are derivatives in reverse mode only.

    Args:
      divided: whether the positions may be divided over devices. Then all scores are made at once, since devices could
        not make the blocks at the same time.
      limit: how many scores, queries x keys, a GPU or TPU may hold of an image; a CPU never holds more than a block.
    """
    if divided:
        return jax.nn.dot_product_attention(q, k, v)
    elsewhere = functools.partial(_within, limit)
    if q.shape[1] <= 2 * QUERIES:
        return elsewhere(q, k, v)
    return lax.platform_dependent(q, k, v, cpu=_on_cpu, default=elsewhere)


def _within(limit, q, k, v):
    """All scores at once, or as many as the limit allows."""
    b, n, h, c = q.shape
    if n * n <= limit:
        return jax.nn.dot_product_attention(q, k, v)
    size = max(1, int(limit) // n)
    blocks = -(-n // size)
    padded = jnp.pad(q, ((0, 0), (0, blocks * size - n), (0, 0), (0, 0)))
    by_block = jnp.moveaxis(padded.reshape(b, blocks, size, h, c), 1, 0)
    found = lax.map(jax.checkpoint(lambda queries: jax.nn.dot_product_attention(queries, k, v)), by_block)
    return jnp.moveaxis(found, 0, 1).reshape(b, blocks * size, h, c)[:, :n]


@jax.custom_vjp
def _on_cpu(q, k, v):
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    """The result, and what the backward pass needs: it, inputs, and of every query the top score and the sum of exp."""
    queries, keys, values = _blocks(q) * q.shape[-1] ** -0.5, _by_head(k), _by_head(v)

    def block(queries):
        scores = _product("bhqc,bhkc->bhqk", queries, keys)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        return _product("bhqk,bhkc->bhqc", weights, values) / total, top, total

    found, top, total = lax.map(block, queries)
    return _joined(found, q), (q, k, v, found, top, total)


def _backward(saved, gradient):
    """The closed form: d scores = weights (d weights - sum over keys of weights d weights).

    That sum is the product of the result and its gradient, which have far fewer numbers (arXiv 2205.14135, appendix B).
    """
    q, k, v, found, top, total = saved
    scale = q.shape[-1] ** -0.5
    # Not the weights are divided by their total, but the gradient of the result, which has fewer numbers.
    keys, values, of_result = _by_head(k), _by_head(v), _blocks(gradient) / total
    mean = jnp.sum(found * of_result, -1, keepdims=True)

    def block(sums, arrays):
        queries, top, mean, of_result = arrays
        weights = jnp.exp(_product("bhqc,bhkc->bhqk", queries, keys) - top)
        of_weights = _product("bhqc,bhkc->bhqk", of_result, values)
        of_scores = weights * (of_weights - mean)
        of_keys = _product("bhqk,bhqc->bhck", of_scores, queries)
        of_values = _product("bhqk,bhqc->bhck", weights, of_result)
        return (sums[0] + of_keys, sums[1] + of_values), _product("bhqk,bhkc->bhqc", of_scores, keys)

    zeros = tuple(jnp.zeros_like(jnp.swapaxes(x, 2, 3)) for x in (keys, values))  # products are faster in [b, h, c, n]
    (of_keys, of_values), of_queries = lax.scan(block, zeros, (_blocks(q) * scale, top, mean, of_result))
    return (
        _joined(of_queries * scale, q),
        jnp.transpose(of_keys, (0, 3, 1, 2)).astype(k.dtype),
        jnp.transpose(of_values, (0, 3, 1, 2)).astype(v.dtype),
    )


_on_cpu.defvjp(_forward, _backward)


def _by_head(x):
    """[b, h, n, c], at least float32."""
    return jnp.swapaxes(x, 1, 2).astype(jnp.promote_types(x.dtype, jnp.float32))


def _blocks(x):
    """[blocks, b, h, QUERIES, c], at least float32; what is missing in the last block is zero."""
    b, n, h, c = x.shape
    padded = jnp.pad(_by_head(x), ((0, 0), (0, 0), (0, -n % QUERIES), (0, 0)))
    return jnp.moveaxis(padded.reshape(b, h, -1, QUERIES, c), 2, 0)


def _joined(blocks, like):
    """The inverse of `_blocks`, in the dtype of `like`."""
    b, n, h, c = like.shape
    return jnp.swapaxes(jnp.moveaxis(blocks, 0, 2).reshape(b, h, -1, c)[:, :, :n], 1, 2).astype(like.dtype)


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, precision="highest")
