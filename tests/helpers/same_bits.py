"""Compares two states of a training exactly."""

import jax
import numpy as np


def assert_same_bits(a, b) -> None:
    """Fails with the name of the first array that differs between two trees of the same form."""
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
