"""Parameters as flat dictionaries by name, and the check that a set of tensors is exactly the one a network needs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fvq_jax.errors import InputError
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.sharding import path_name

SHOWN = 10  # names in a message about a bad checkpoint


def flatten(params: Any) -> dict[str, Any]:
    """{"encoder/conv_in/conv/kernel": ...}: every leaf by its path."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def abstract_params(net: TokenizerNet) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of `net`, without making one."""
    side = 2 ** (len(net.ch_mult) - 1)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), image)["params"]


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, all float32; it replaces what is at `path` once it is whole. OSError as any file."""
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        # Not save_file, which makes files that no other user can read.
        unfinished.write_bytes(safetensors.numpy.save(arrays, metadata))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


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
