"""The search on a CPU by a k-d tree of SciPy, which compares a token with a few codes only. Called by `ops/nearest.py`.

It pays for very many codes of few dimensions: with many dimensions a tree has to look at nearly all codes. The tree is
built anew for every table, outside the compiled program, and the last one is kept. On a mesh every device has a tree
of its rows; a program that XLA divides by itself gives every device all tokens, which is right, but no faster.
"""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.spatial import KDTree

from fvq_jax.ops.vectors import l2_normalize

FAR = 1e30  # stands for what is not finite, which SciPy refuses


def candidates(
    query: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    bias: Float[Array, "k"],
    *,
    normalize: bool,
) -> tuple[Float[Array, "n 1"], Int[Array, "n 1"]]:
    """Finds the smallest score of every token, -2 (z - m).(e - m) + |e - m|^2, and the code that has it.

    Distances are float64, between what was shifted and normalized in float32. Of equal codes the lowest index is found;
    of different codes at the same distance, any.
    """
    # Here, since JAX calls it experimental: should it move, only this search would be lost.
    from jax.experimental.buffer_callback import buffer_callback

    codes = codebook.astype(jnp.float32)
    codes = (l2_normalize(codes) if normalize else codes) - center[None]
    tokens = jax.ShapeDtypeStruct(query.shape[:1], jnp.int32)
    index = buffer_callback(_call, tokens, vmap_method="sequential")(query / -2, codes)
    index += jnp.zeros_like(query[:, 0], jnp.int32)  # under `shard_map` it varies over devices as `query` does
    score = jnp.sum(codes[index] * query, axis=1) + bias[index]
    return score[:, None], index[:, None]


def _call(context, index, z, codes):
    """Writes the indices to a buffer of the program, whose arrays are read where they are."""
    del context
    np.asarray(index)[:] = _trees.of(np.asarray(codes)).nearest(np.asarray(z))


class CodeTree:
    """A k-d tree of the rows of a table [k, d], of which several may be equal."""

    def __init__(self, table: np.ndarray):
        self.table = table.copy()  # what was given is a buffer that is used again
        self._first = _first_of_equal(self.table)
        rows = self.table if self._first is None else self.table[self._first]
        # Such a tree takes a third of the time to build, and queries take no longer.
        self._tree = KDTree(_finite(rows), leafsize=32, balanced_tree=False, compact_nodes=False)

    def nearest(self, z: np.ndarray) -> np.ndarray:
        """The index of the nearest row for every vector [n, d]; of equal rows the first."""
        # SciPy's own -1 counts all cores of the machine, also those that this process may not use; `runtime` knows them
        # too, but this room imports none.
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else -1
        index = self._tree.query(_finite(z), workers=threads)[1]
        return index if self._first is None else self._first[index]


class _Last:
    """The tree of the last table, since an evaluation asks for the same one again and again."""

    def __init__(self):
        self._tree, self._lock = None, threading.Lock()

    def of(self, table):
        with self._lock:
            if self._tree is None or not np.array_equal(self._tree.table, table, equal_nan=True):
                self._tree = None  # its memory is free before the next one is built
                self._tree = CodeTree(table)
            return self._tree


_trees = _Last()


def _first_of_equal(table):
    """Where each different row comes first, in order; None if all rows differ.

    Sorting whole rows takes longer than building the tree, so only rows are compared that agree in a weighted sum.
    """
    total = np.zeros(len(table))
    for column, weight in zip(table.T, np.random.default_rng(0).uniform(1, 2, table.shape[1]), strict=True):
        total += column * weight
    ordered = np.sort(total)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return None
    rows = np.flatnonzero(np.isin(total, again))
    is_first = np.ones(len(table), bool)
    is_first[rows] = False
    is_first[rows[np.unique(table[rows], axis=0, return_index=True)[1]]] = True
    return np.flatnonzero(is_first)


def _finite(x):
    x = x.astype(np.float64)
    return x if np.isfinite(x).all() else np.nan_to_num(x, nan=FAR, posinf=FAR, neginf=-FAR)
