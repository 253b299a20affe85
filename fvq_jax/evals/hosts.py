"""Adding up what every host has counted."""

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")
_CHUNK = 1 << 20  # elements sent at once, so that no host ever holds all hosts' covariances


def sum_over_hosts(tree: Tree) -> Tree:
    """The sum over all hosts of every leaf, numpy of any 64-bit type, exact in that type; all hosts must call it."""
    return tree if jax.process_count() == 1 else jax.tree.map(_sum, tree)


def _sum(leaf: np.ndarray | np.generic) -> np.ndarray | np.generic:
    leaf = np.asarray(leaf)
    flat = np.ascontiguousarray(leaf).reshape(-1)
    parts = []
    for start in range(0, flat.size, _CHUNK):
        # As bytes: JAX would round 64 bits to 32.
        sent = flat[start : start + _CHUNK].view(np.uint8)
        gathered = np.asarray(multihost_utils.process_allgather(sent)).view(flat.dtype)
        parts.append(gathered.sum(axis=0))
    return np.concatenate(parts).reshape(leaf.shape)[()] if parts else leaf
