"""Tensors by name: which ones a network needs, the check that a set is exactly that, and files of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole

SHOWN = 10  # names in a message about a bad checkpoint


def abstract_variables(net: TokenizerNet) -> dict[str, Any]:
    """Shapes and dtypes of the variables of `net` by collection: `params`, and its state if there is any."""
    image = jax.ShapeDtypeStruct((1, net.downsampling, net.downsampling, 3), jnp.float32)
    variables = dict(jax.eval_shape(net.init, jax.random.key(0), image))
    variables.pop("intermediates", None)
    return variables


def abstract_params(net: TokenizerNet) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of `net`, without making one."""
    return abstract_variables(net)["params"]


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, all float32; it replaces what is at `path` once it is whole. May raise OSError."""
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    with replace_whole(path) as unfinished:
        # Not save_file, which makes files that no other user can read.
        unfinished.write_bytes(safetensors.numpy.save(arrays, metadata))


def check_tensors(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], source: str) -> None:
    """InputError, naming `source`, unless `tensors` are floating-point and have exactly the `wanted` names and shapes.

    Lists what is missing, extra, of another shape or type: the first ten names of each, and how many there are.
    """
    common = [name for name in wanted if name in tensors]
    found = {
        "missing": [name for name in wanted if name not in tensors],
        "extra": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(wanted[name])}"
            for name in common
            if tensors[name].shape != wanted[name]
        ],
        "not floating-point": [
            f"{name} ({tensors[name].dtype})"
            for name in common
            if not jnp.issubdtype(tensors[name].dtype, jnp.floating)
        ],
    }
    problems = [
        f"{len(names)} tensor{'' if len(names) == 1 else 's'} {what}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for what, names in found.items()
        if names
    ]
    if problems:
        raise InputError(f"{source} does not hold this tokenizer: {'; '.join(problems)}")
