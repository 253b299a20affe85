"""The moving average of weights as Lightning programs of the VQGAN family keep it: under names without dots."""

import re
from collections.abc import Mapping

import numpy as np

from fvq_jax.runtime.errors import InputError

AVERAGE = "model_ema."  # in front of the names


def averages(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """These tensors once more, as moving averages, with what the published class keeps beside them."""
    counters = {f"{AVERAGE}decay": np.float32(0.999), f"{AVERAGE}num_updates": np.float32(-1)}
    shadows = {AVERAGE + name.replace(".", ""): value for name, value in tensors.items()}
    return shadows | {name: np.asarray(value) for name, value in counters.items()}


def averaged(tensors: Mapping[str, np.ndarray], weights: str, source: str) -> dict[str, np.ndarray]:
    """The tensors without moving averages; if there were any, they replace those whose names start with `weights`.

    InputError, which names `source`, if only some of these have one.
    """
    found = {name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)}
    plain = {name: value for name, value in tensors.items() if not name.startswith(AVERAGE)}
    if not found:
        return plain
    shadows = {name: name.replace(".", "") for name in plain if re.match(weights, name)}
    missing = [f"{AVERAGE}{shadow}" for shadow in shadows.values() if shadow not in found]
    if missing:
        raise InputError(f"{source} has a moving average of some weights only: it lacks {', '.join(missing[:3])}")
    return plain | {name: found[shadow] for name, shadow in shadows.items()}
