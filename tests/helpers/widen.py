"""Importing this first makes everything that a process imports afterwards compute in float64 where it says float32.

The package names `jnp.float32` wherever it decides on a precision, so the same program runs with wider numbers.
"""

import jax
import jax.numpy as jnp


def attention(query, key, value):
    """`jax.nn.dot_product_attention`, whose own softmax is in float32 whatever it is given."""
    scores = jnp.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores), value)


jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64
jax.nn.dot_product_attention = attention
