"""Sum, minimum and gather over hosts (the processes of a run). All must call these functions, in the same order."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")
_CHUNK = 1 << 20  # elements sent at once, so that no host ever holds all hosts' covariances


def sum_over_hosts(tree: Tree) -> Tree:
    """The sum over all hosts of every leaf, a numpy array of any type; exact in that type."""
    return _combine(tree, np.sum)


def min_over_hosts(tree: Tree) -> Tree:
    """The least value over all hosts of every element of every leaf, a numpy array of any type."""
    return _combine(tree, np.min)


def rows_of_all_hosts(rows: np.ndarray) -> np.ndarray:
    """The rows [n, ...] of every host, those of the first host first: [hosts n, ...]. All must have the same n."""
    if jax.process_count() == 1:
        return rows
    gathered = _gather(np.ascontiguousarray(rows).reshape(-1))
    return gathered.reshape(-1, *rows.shape[1:])


def _combine(tree: Tree, reduce: Callable[..., np.ndarray]) -> Tree:
    if jax.process_count() == 1:
        return tree

    def combine(leaf: np.ndarray | np.generic) -> np.ndarray | np.generic:
        leaf = np.asarray(leaf)
        flat = np.ascontiguousarray(leaf).reshape(-1)
        parts = [np.zeros(0, flat.dtype)]
        for start in range(0, flat.size, _CHUNK):
            parts.append(reduce(_gather(flat[start : start + _CHUNK]), axis=0).astype(flat.dtype))
        return np.concatenate(parts).reshape(leaf.shape)[()]

    return jax.tree.map(combine, tree)


def _gather(flat: np.ndarray) -> np.ndarray:
    """The arrays of all hosts, [hosts, n]; sent as bytes, since JAX would cut 64-bit numbers to 32 bits."""
    return np.asarray(multihost_utils.process_allgather(flat.view(np.uint8))).view(flat.dtype)
