"""The moving average of weights as Lightning programs of the VQGAN family keep it: under names without dots."""

import re
from collections.abc import Mapping

import numpy as np

from fvq_jax.runtime.errors import InputError

AVERAGE = "model_ema."  # in front of the names


def averages(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """These tensors once more, as moving averages."""
    return {AVERAGE + name.replace(".", ""): value for name, value in tensors.items()}


def averaged(tensors: Mapping[str, np.ndarray], weights: str, source: str) -> dict[str, np.ndarray]:
    """The tensors without moving averages; if there were any, they replace those whose names start with `weights`.

    All names may have a prefix in front of that. InputError, which names `source`, if only some of these have a moving
    average.
    """
    prefixes = {match[1] for name in tensors if (match := re.match(rf"(|.*\.){re.escape(AVERAGE)}", name))}
    plain = {
        name: value for name, value in tensors.items() if not name.startswith(tuple(p + AVERAGE for p in prefixes))
    }
    for prefix in prefixes:
        inner = [name for name in plain if re.match(re.escape(prefix) + weights, name)]
        shadows = {name: prefix + AVERAGE + name.removeprefix(prefix).replace(".", "") for name in inner}
        missing = [shadow for shadow in shadows.values() if shadow not in tensors]
        if missing:
            raise InputError(f"{source} has a moving average of some weights only: it lacks {', '.join(missing[:3])}")
        plain |= {name: tensors[shadow] for name, shadow in shadows.items()}
    return plain
