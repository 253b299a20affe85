"""The programs of a generator on the rows of one device; `generator` spreads them over devices."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from fvq_jax.models.gpt import GPT
from fvq_jax.models.gpt_cache import Weights, decode
from fvq_jax.ops.sampling import draw, greedy, guided, image_keys, random_words
from fvq_jax.ops.token_loss import token_nll


def sample_rows(
    net: GPT,
    doubled: bool,
    likeliest: bool,
    cut_k: bool,
    cut_p: bool,
    weights: Weights,
    seed: UInt32[Array, ""],
    scales: Float[Array, "t"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    labels: Int[Array, "b"],
    numbers: UInt32[Array, "b"],
) -> Int[Array, "b t"]:
    """Codes [b, t]; with guidance (`doubled`) an image has two rows side by side, with its class and without."""
    keys = image_keys(seed, numbers)
    rows = jnp.stack([labels, jnp.full_like(labels, net.classes)], axis=1).reshape(-1) if doubled else labels

    def choose(logits: Float[Array, "rows v"], position: Int[Array, ""]) -> Int[Array, "rows"]:
        if doubled:
            logits = jnp.asarray(guided(logits[0::2], logits[1::2], scales[position]))
        if likeliest:
            chosen = greedy(logits)
        else:
            chosen = draw(
                logits,
                random_words(keys, position),
                temperature=temperature,
                top_k=top_k if cut_k else None,
                top_p=top_p if cut_p else None,
            )
        return jnp.repeat(chosen, 2) if doubled else chosen

    codes = decode(net, weights, rows, choose)
    return codes[0::2] if doubled else codes


def logits_rows(
    net: GPT, params: dict[str, Any], labels: Int[Array, "b"], codes: Int[Array, "b t"]
) -> Float[Array, "b t v"]:
    """The logits at every position, teacher forced."""
    logits: Any = net.apply({"params": params}, labels, codes, method="logits")
    return logits


def nll_bits_rows(
    net: GPT, params: dict[str, Any], labels: Int[Array, "b"], codes: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """The bits that every code costs, teacher forced."""
    hidden: Any = net.apply({"params": params}, labels, codes)
    nats, _ = token_nll(hidden, params["output"], codes, dtype=net.dtype)
    return nats / jnp.log(2.0)
