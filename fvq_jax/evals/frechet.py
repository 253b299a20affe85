"""Frechet distance between two sets of features, and the statistics it needs, collected in a stream.

For features of InceptionV3 (`evals.inception`) the distance is called FID (arXiv 1706.08500), and rFID if it is between
pictures and their reconstructions. Everything is float64 on the host. Callers decide on the pictures.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float64

from fvq_jax.runtime.errors import InputError

UNBIASED_FROM = 10_000  # below this number of pictures the distance is biased upwards so much that readers are told
Vector = Float64[np.ndarray, "d"]
Matrix = Float64[np.ndarray, "d d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class FeatureStatistics:
    """Running sums over feature vectors; those of disjoint sets (batches, hosts) simply add up.

    Attributes:
      count: how many vectors.
      total: their sum [d].
      products: the sum of their outer products [d, d].
    """

    count: np.int64
    total: Vector
    products: Matrix

    @classmethod
    def empty(cls, dimension: int) -> "FeatureStatistics":
        """The statistics of no vectors."""
        return cls(np.int64(0), np.zeros(dimension), np.zeros((dimension, dimension)))

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Counts these vectors in. InputError if one is not finite."""
        features = np.asarray(features, np.float64)
        if not np.isfinite(features).all():
            raise InputError("features are not finite: check the weight file they were computed with")
        self.count += len(features)
        self.total += features.sum(axis=0)
        self.products += features.T @ features

    def moments(self) -> tuple[Vector, Matrix]:
        """Mean, and covariance with n - 1 in the denominator. InputError for fewer than two vectors."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 feature vectors, not {self.count}")
        mean = self.total / self.count
        return mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: Any, b: Any) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared Frechet distance of two Gaussians.

    With any factors C = F^T F the trace of the square root is the sum of the singular values of F_a F_b^T. So no matrix
    square root is taken: it fails or turns complex for singular covariances (fewer samples than dimensions). And no
    covariance of samples is formed: that would square the condition number.

    Args:
      a, b: each an array of feature vectors [n, d], n >= 2 and any size relative to d, or a pair (mean [d], covariance
        [d, d]). Covariances have n - 1 in the denominator, as numpy's.

    Returns:
      The distance, at least 0.

    Raises:
      InputError: another shape, not finite, or a covariance that is not symmetric.
    """
    mean_a, factor_a = _gaussian(a)
    mean_b, factor_b = _gaussian(b)
    if mean_a.shape != mean_b.shape:
        raise InputError(f"features of {len(mean_a)} and of {len(mean_b)} dimensions cannot be compared")
    between = np.sum(np.square(mean_a - mean_b))
    within = np.sum(np.square(factor_a)) + np.sum(np.square(factor_b))
    shared = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    return max(0.0, float(between + within - 2 * shared))


def _gaussian(given: Any) -> tuple[Vector, Float64[np.ndarray, "r d"]]:
    """Mean, and a factor F of the covariance F^T F with at most d rows."""
    if isinstance(given, tuple | list) and len(given) == 2 and np.ndim(given[0]) == 1 and np.ndim(given[1]) == 2:
        return _of_moments(np.asarray(given[0], np.float64), np.asarray(given[1], np.float64))
    features = np.asarray(given, np.float64)
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise InputError(
            "features must be an array [n, d] with n at least 2, or a pair (mean [d], covariance [d, d]), not of shape "
            f"{list(features.shape)}"
        )
    _check_finite(features)
    mean = features.mean(axis=0)
    factor = (features - mean) / np.sqrt(len(features) - 1)
    if len(factor) > len(mean):
        factor = np.linalg.qr(factor, mode="r")
    return mean, factor


def _of_moments(mean: Vector, covariance: Float64[np.ndarray, "_ _"]) -> tuple[Vector, Float64[np.ndarray, "r d"]]:
    if covariance.shape != (len(mean), len(mean)):
        raise InputError(f"a mean of {len(mean)} dimensions does not fit a covariance of shape {covariance.shape}")
    _check_finite(mean, covariance)
    largest = np.abs(covariance).max(initial=0.0)
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-6 * largest:
        raise InputError("a covariance must be symmetric")
    covariance = (covariance + covariance.T) / 2
    try:
        return mean, np.linalg.cholesky(covariance).T
    except np.linalg.LinAlgError:  # singular: the eigenvectors take ten times as long
        values, vectors = np.linalg.eigh(covariance)
    # Eigenvalues of 0 become small numbers of either sign by rounding; the square root would enlarge them.
    noise = len(mean) * np.finfo(np.float64).eps * largest
    kept = values > noise
    return mean, np.sqrt(values[kept])[:, None] * vectors.T[kept]


def _check_finite(*arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise InputError("features and their statistics must be finite")


def biased(metrics: Iterable[str], pictures: int) -> dict[str, str]:
    """Which of these metrics are Frechet distances of so few pictures that they are biased upwards, and why."""
    if pictures >= UNBIASED_FROM:
        return {}
    reason = f"upwards: {pictures:,} pictures are fewer than {UNBIASED_FROM:,}"
    return {name: reason for name in metrics if name in ("rfid", "fid", "sfid")}
