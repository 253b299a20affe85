"""Decoding with a cache of keys and values: all codes of a batch in one program, without Python between them.

At position p the input is the class (p = 0) or code p - 1, and the output predicts code p. Every layer has an array of
keys and one of values, which the loop carries and writes in place, one row per position. The loop is cut into segments:
an array has only as many rows as its segment needs, and grows between two segments, so that nearly nothing is read that
is not filled. A row of activations is a column here, [channels, rows]: of all forms of a product of a large matrix and
few vectors it is the one that runs at the speed of memory on a CPU (`benchmarks/sampling.py`).

How a code follows from logits is left to the caller (`ops.sampling`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fvq_jax.models.gpt import GPT, rms_norm, rotate, rotations
from fvq_jax.ops.matmul import matmul_precision

SEGMENT = 64  # positions after which the cache grows, but at most `MAX_SEGMENTS` times: each takes time to compile
MAX_SEGMENTS = 4
_ROWS = 8  # segments end at multiples of it

Weights = dict[str, Any]
Cache = list[tuple[Array, Array]]  # keys and values of every layer, each [rows, heads, positions, head_width]
Choose = Callable[[Float[Array, "rows v"], Int[Array, ""]], Int[Array, "rows"]]


def decoding_weights(params: Mapping[str, Any], dtype: DTypeLike) -> Weights:
    """The parameters as the decoder reads them: every layer by itself, matrices [out, in] in `dtype`, norms float32.

    Embeddings stay [classes + 1, d] and [v, d]. The two matrices into a feed-forward network become one.
    """

    def matrix(value: Any) -> Array:
        return jnp.asarray(value, dtype)

    def layer(number: int) -> dict[str, Array]:
        own = {name: value[number] for name, value in params["layers"].items()}
        return {
            "wqkv": matrix(own["wqkv"].T),
            "wo": matrix(own["wo"].T),
            "w13": matrix(jnp.concatenate([own["w1"], own["w3"]], axis=1).T),
            "w2": matrix(own["w2"].T),
            "attention_norm": jnp.asarray(own["attention_norm"], jnp.float32),
            "ffn_norm": jnp.asarray(own["ffn_norm"], jnp.float32),
        }

    return {
        "cls_embedding": matrix(params["cls_embedding"]),
        "tok_embedding": matrix(params["tok_embedding"]),
        "layers": [layer(number) for number in range(params["layers"]["wo"].shape[0])],
        "norm": jnp.asarray(params["norm"], jnp.float32),
        "output": matrix(params["output"]),
    }


def segment_ends(length: int) -> list[int]:
    """Where each segment of the positions 0 to length - 1 ends; multiples of 8, except for the last one."""
    count = min(MAX_SEGMENTS, -(-length // SEGMENT))
    return sorted({min(length, -(-length * number // (count * _ROWS)) * _ROWS) for number in range(1, count + 1)})


def decode(
    net: GPT,
    weights: Weights,
    labels: Int[Array, "rows"],
    choose: Choose,
    *,
    cache_dtype: DTypeLike | None = None,
) -> Int[Array, "rows t"]:
    """The codes that `choose` picks, one after the other, for every row.

    Args:
      net: the network; its `dtype` is that of the products.
      weights: see `decoding_weights`.
      labels: the class of every row, `net.classes` for "no class".
      choose: gets the logits, float32, and the position, and returns a code for every row; rows of one image, with and
        without its class, must get the same code.
      cache_dtype: of keys and values; None: `net.dtype`.
    """
    rows, dtype = labels.shape[0], net.dtype if cache_dtype is None else cache_dtype
    cos, sin = jnp.asarray(rotations(net.grid, net.head_width, net.rope_base))
    x = weights["cls_embedding"][labels].T.astype(jnp.float32)
    codes = jnp.zeros((rows, net.length), jnp.int32)
    cache: Cache = [(jnp.zeros((rows, net.heads, 0, net.head_width), dtype),) * 2 for _ in weights["layers"]]

    def step(position: Array, carry: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        codes, x, cache = carry
        logits, cache = _next_logits(net, weights, x, cache, position, cos[position], sin[position])
        chosen = choose(logits, position)
        codes = jax.lax.dynamic_update_slice(codes, chosen[:, None], (0, position))
        return codes, weights["tok_embedding"][chosen].T.astype(jnp.float32), cache

    start = 0
    for end in segment_ends(net.length):
        grown = [(0, 0), (0, 0), (0, end - start), (0, 0)]
        cache = [(jnp.pad(keys, grown), jnp.pad(values, grown)) for keys, values in cache]
        codes, x, cache = jax.lax.fori_loop(start, end, step, (codes, x, cache))
        start = end
    return codes


def _next_logits(
    net: GPT,
    weights: Weights,
    x: Float[Array, "d rows"],
    cache: Sequence[tuple[Array, Array]],
    position: Int[Array, ""],
    cos: Float[Array, "p"],
    sin: Float[Array, "p"],
) -> tuple[Float[Array, "rows v"], Cache]:
    """Logits after one more input, and the cache with its keys and values at `position`."""
    new_cache: Cache = []
    for layer, (keys, values) in zip(weights["layers"], cache, strict=True):
        mixed = _product(layer["wqkv"], _normed(x, layer["attention_norm"], net))
        # [3, rows, 1, heads, head_width]: small arrays, whose order costs nothing
        q, k, v = mixed.reshape(3, net.heads, net.head_width, -1).transpose(0, 3, 1, 2)[:, :, None]
        q, k = (rotate(each, cos[None], sin[None]) for each in (q, k))
        at = (0, 0, position, 0)
        keys = jax.lax.dynamic_update_slice(keys, k.astype(keys.dtype).transpose(0, 2, 1, 3), at)
        values = jax.lax.dynamic_update_slice(values, v.astype(values.dtype).transpose(0, 2, 1, 3), at)
        new_cache.append((keys, values))
        attended = _attend(q[:, 0], keys, values, position)
        x = x + _product(layer["wo"], attended.reshape(x.shape[::-1]).T.astype(net.dtype)).astype(jnp.float32)
        gate, up = jnp.split(_product(layer["w13"], _normed(x, layer["ffn_norm"], net)), 2)
        x = x + _product(layer["w2"], jax.nn.silu(gate) * up).astype(jnp.float32)
    logits = _product(weights["output"], _normed(x, weights["norm"], net), jnp.float32)
    return logits.T, new_cache


def _normed(x: Float[Array, "d rows"], weight: Float[Array, "d"], net: GPT) -> Float[Array, "d rows"]:
    return jax.vmap(rms_norm, (1, None, None), 1)(x, weight, net.eps).astype(net.dtype)


def _product(
    matrix: Float[Array, "f c"], x: Float[Array, "c rows"], dtype: DTypeLike | None = None
) -> Float[Array, "f rows"]:
    """matrix @ x in the dtype of x; with `dtype`, its sums are not rounded to that of x but to this one.

    The barriers keep the compiler from turning the product of columns into one of rows, to save a transposition of what
    comes or goes: on a CPU that one takes up to 18 times as long.
    """
    x = jax.lax.optimization_barrier(x)
    product = jnp.matmul(matrix, x, precision=matmul_precision(x.dtype), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(product)


def _attend(
    q: Float[Array, "rows h c"],
    keys: Float[Array, "rows h s c"],
    values: Float[Array, "rows h s c"],
    position: Int[Array, ""],
) -> Float[Array, "rows h c"]:
    """Attention of one query to the positions up to its own; softmax in float32."""
    precision = matmul_precision(keys.dtype)
    q = q.astype(keys.dtype)
    scores = jnp.einsum("rhc,rhsc->rhs", q, keys, precision=precision, preferred_element_type=jnp.float32)
    seen = jnp.arange(keys.shape[2]) <= position
    scores = jnp.where(seen, scores * q.shape[-1] ** -0.5, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("rhs,rhsc->rhc", shares, values, precision=precision)
