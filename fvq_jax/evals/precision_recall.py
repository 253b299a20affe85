"""Precision and recall of samples: how many look real, and how many of the real pictures could have been sampled.

Every set of pictures is taken for the union of balls around its features (arXiv 1904.06991). A ball reaches from a
picture to its k-th nearest neighbour in the same set. Precision is the share of samples that lie in a ball of a real
picture, recall the share of real pictures that lie in a ball of a sample.

Distances are squared, |u|^2 - 2 u.v + |v|^2, and computed by blocks on the local devices, so that no matrix of all
pairs exists. The evaluation suite of ADM (guided-diffusion) computes each of these terms in float16, which moves both
figures by some thousandths. That is the option `adm`; the default `float32` computes them as they are.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32

from fvq_jax.runtime.errors import InputError, require

NEIGHBOURS = 3  # k
DISTANCES = {
    "float32": "squared distances in float32",
    "adm": "squared distances in float16, as in ADM's evaluation suite (float32 in blocks where float16 overflows)",
}
BLOCKS = {"float32": 4096, "adm": 10_000}  # rows and columns of a block; ADM's size decides where `adm` falls back
Features = Float32[np.ndarray, "_ _"]


def precision_recall(
    reference: Features,
    samples: Features,
    *,
    distances: str = "float32",
    neighbours: int = NEIGHBOURS,
    block: int | None = None,
    progress: Callable[[int], Any] = lambda pairs: None,
) -> tuple[float, float]:
    """Precision and recall of samples against real pictures, both in [0, 1].

    A picture lies in a ball also if it lies on its border. Memory beside the features: a few matrices of `block` x
    `block` distances.

    Args:
      reference, samples: features of real pictures [m, d] and of samples [n, d].
      distances: a name in `DISTANCES`.
      neighbours: k; the picture itself is not one of its neighbours.
      block: how many rows and columns are compared at a time; None takes that of `BLOCKS`. With `adm`, a block with a
        distance that is not finite in float16 is computed in float32 as a whole, as ADM does.
      progress: called with the number of pairs that were compared since the last call, see `pairs`.

    Raises:
      InputError: features that are not finite or do not fit, fewer than k + 1 of either, or unknown `distances`.
    """
    require(distances in DISTANCES, f"unknown distances {distances!r}: use one of {', '.join(DISTANCES)}")
    for what, features in (("samples", samples), ("reference pictures", reference)):
        check_enough(len(features), what, neighbours)
        require(bool(np.isfinite(features).all()), f"features of the {what} are not finite: check the weight file")
    if reference.shape[1] != samples.shape[1]:
        raise InputError(f"features of {reference.shape[1]} and of {samples.shape[1]} dimensions cannot be compared")
    compare = _Comparison(distances, neighbours, block or BLOCKS[distances], progress)
    radii_of_reference, radii_of_samples = compare.radii(reference), compare.radii(samples)
    real_inside, samples_inside = compare.inside(reference, radii_of_reference, samples, radii_of_samples)
    return float(samples_inside.mean()), float(real_inside.mean())


def check_enough(pictures: int, what: str, neighbours: int = NEIGHBOURS) -> None:
    """Raises InputError unless there are enough pictures for precision and recall; `what` names them."""
    if pictures <= neighbours:
        raise InputError(
            f"precision and recall need at least {neighbours + 1} {what} (a picture and its {neighbours} nearest "
            f"neighbours), not {pictures}"
        )


def pairs(reference: int, samples: int) -> int:
    """How many pairs `precision_recall` compares, for so many reference pictures and samples."""
    return reference**2 + samples**2 + reference * samples


class _Comparison:
    """Blocks of distances, their rows divided over the local devices."""

    def __init__(self, distances: str, neighbours: int, block: int, progress: Callable[[int], Any]):
        self._block, self._neighbours, self._progress = block, neighbours, progress
        mesh = Mesh(np.array(jax.local_devices()), ("rows",))
        self._devices = mesh.size
        self._rows, self._whole = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
        # XLA may leave out a rounding to float16 between two operations unless it is told not to.
        options = {"xla_allow_excess_precision": False}
        exact = distances == "float32"
        self._nearest = jax.jit(functools.partial(_nearest, neighbours, exact), compiler_options=options)
        self._inside = jax.jit(functools.partial(_inside, exact), compiler_options=options)

    def radii(self, features: Features) -> Float32[np.ndarray, "n"]:
        """The squared distance of every picture to its k-th nearest neighbour among the others."""
        radii = np.empty(len(features), np.float32)
        for rows in self._blocks(features):
            left, _ = self._put(features[rows], self._rows, fill=True)
            # The least k + 1 distances found so far; the first is that of a picture to itself.
            least = jax.device_put(np.full((len(left), self._neighbours + 1), np.inf, np.float32), self._rows)
            for columns in self._blocks(features):
                right, valid = self._put(features[columns], self._whole, fill=True)
                least = self._nearest(least, left, right, valid)
                self._progress(_length(rows) * _length(columns))
            radii[rows] = np.asarray(least)[: _length(rows), -1]
        return radii

    def inside(
        self, first: Features, radii_first: np.ndarray, second: Features, radii_second: np.ndarray
    ) -> tuple[Bool[np.ndarray, "m"], Bool[np.ndarray, "n"]]:
        """Which of the first lie in a ball of the second, and which of the second in a ball of the first."""
        first_inside, second_inside = np.zeros(len(first), bool), np.zeros(len(second), bool)
        for rows in self._blocks(first):
            left, _ = self._put(first[rows], self._rows, fill=True)
            left_radii, _ = self._put(radii_first[rows], self._rows)
            for columns in self._blocks(second):
                right, _ = self._put(second[columns], self._whole, fill=True)
                right_radii, _ = self._put(radii_second[columns], self._whole)
                ours, theirs = self._inside(left, left_radii, right, right_radii)
                first_inside[rows] |= np.asarray(ours)[: _length(rows)]
                second_inside[columns] |= np.asarray(theirs)[: _length(columns)]
                self._progress(_length(rows) * _length(columns))
        return first_inside, second_inside

    def _blocks(self, features: np.ndarray) -> list[slice]:
        return [slice(start, min(start + self._block, len(features))) for start in range(0, len(features), self._block)]

    def _put(self, rows: np.ndarray, layout: NamedSharding, *, fill: bool = False) -> tuple[jax.Array, jax.Array]:
        """The rows on the devices, and which of them are no padding. Few numbers of rows mean few programs.

        Radii are padded with -1, so that nothing lies in their balls, and features (`fill`) with their first row, so
        that the padding never overflows where the rows themselves do not.
        """
        count = len(rows)
        whole = math.lcm(self._devices, 64)
        size = -(-count // whole) * whole
        padded = np.full((size, *rows.shape[1:]), rows[0] if fill else -1, rows.dtype)
        padded[:count] = rows
        return jax.device_put(padded, layout), jax.device_put(np.arange(size) < count, layout)


def _length(part: slice) -> int:
    return part.stop - part.start


def _nearest(
    neighbours: int,
    exact: bool,
    least: Float32[Array, "r k1"],
    left: Float[Array, "r d"],
    right: Float[Array, "c d"],
    valid: Bool[Array, "c"],
) -> Float32[Array, "r k1"]:
    """The least k + 1 distances of every row, given those so far and one more block of columns."""
    distances = jnp.where(valid[None], _squared_distances(left, right, exact), jnp.inf)
    distances = jnp.concatenate([least, distances], axis=1)
    return -jax.lax.top_k(-distances, neighbours + 1)[0]


def _inside(
    exact: bool,
    left: Float[Array, "r d"],
    left_radii: Float32[Array, "r"],
    right: Float[Array, "c d"],
    right_radii: Float32[Array, "c"],
) -> tuple[Bool[Array, "r"], Bool[Array, "c"]]:
    """Which rows lie in a ball of a column, and which columns in a ball of a row; padding has radius -1."""
    distances = _squared_distances(left, right, exact)
    return jnp.any(distances <= right_radii[None], axis=1), jnp.any(distances <= left_radii[:, None], axis=0)


def _squared_distances(left: Float[Array, "r d"], right: Float[Array, "c d"], exact: bool) -> Float32[Array, "r c"]:
    if exact:
        return _distances(left, right)
    rounded = _distances(left.astype(jnp.float16), right.astype(jnp.float16))
    return jax.lax.cond(jnp.all(jnp.isfinite(rounded)), lambda: rounded, lambda: _distances(left, right))


def _distances(left: Float[Array, "r d"], right: Float[Array, "c d"]) -> Float32[Array, "r c"]:
    """|u|^2 - 2 u.v + |v|^2, at least 0. Every term and every sum of terms is rounded to the type of the arguments.

    Sums over the dimensions are added up in float32 and rounded once, as GPUs do for float16.
    """
    kind = left.dtype

    def squares(rows: Array) -> Array:
        return jnp.sum(jnp.square(rows).astype(jnp.float32), axis=1).astype(kind)

    # The product of two float16 numbers is exact in float32.
    wide = left.astype(jnp.float32), right.astype(jnp.float32)
    products = jnp.matmul(wide[0], wide[1].T, precision=jax.lax.Precision.HIGHEST).astype(kind)
    distances = squares(left)[:, None] - 2 * products + squares(right)[None]
    return jnp.maximum(distances, 0).astype(jnp.float32)
