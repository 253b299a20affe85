"""The folder of a run that has been trained, without the training."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.models.quantizers.placement import Placement
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.state import NetworkState, TrainState
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.tiny import tiny_config


def trained_workdir(
    path: Path,
    *,
    ema_decay: float = 0.0,
    dtype: str = "bfloat16",
    restart_after: float = 0.0,
    region_window: int = 0,
) -> SavedTokenizer:
    """Writes what training leaves: config.json and a checkpoint, whose average differs from its parameters.

    With `restart_after`, every code has an offset of 1 in each channel. With `region_window`, no code was ever chosen.
    """
    saved = random_tokenizer(bridge="XS/2", ch_mult=(1,))
    net, quantizer = saved.net, saved.net.quantizer
    network = {"ch_mult": net.ch_mult, "attention_levels": net.attention_levels, "z_channels": net.z_channels}
    network |= {"dtype": dtype, "quantizer.bridge": quantizer.bridge, "quantizer.restart_after": restart_after}
    network["quantizer.region_window"] = region_window
    changes = {f"tokenizer.{name}": value for name, value in network.items()}
    config = tiny_config(**{"optim.ema_decay": ema_decay}, **changes)
    params = jax.tree.map(jnp.asarray, saved.params)
    zero = jnp.zeros((), jnp.int32)
    variables = {}
    if restart_after:
        codes, dim = params["quantizer"]["codebook"].shape
        places = Placement(codes, dim, restart_after).init(jax.random.key(0), jnp.zeros((codes, dim)))
        places = places["placement"] | {"offset": jnp.ones((codes, dim))}
        variables = {"placement": {"quantizer": {"placement": places}}}
    if region_window:
        variables |= {"region": {"quantizer": {"age": jnp.full(quantizer.codebook_size, region_window, jnp.int32)}}}
    state = NetworkState(params, {"count": zero}, variables)
    average = jax.tree.map(lambda leaf: 2 * leaf, params) if ema_decay else {}
    with Checkpoints(path) as checkpoints:
        checkpoints.save(TrainState(zero, zero, {"tokenizer": state}, average), 0, {})
    (path / "config.json").write_text(json.dumps(json.loads(config.to_json())))
    return saved
