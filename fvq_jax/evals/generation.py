"""Scores of generated pictures: FID, sFID, Inception Score, precision and recall.

As the evaluation suite of ADM (guided-diffusion, `evaluator.py`) computes them, so that the figures can stand beside
published ones. What it reads from InceptionV3, for every picture:

- FID: the 2,048 features after the last pooling (arXiv 1706.08500).
- sFID: 7 channels of a layer at 17 x 17 pixels, 2,023 numbers (arXiv 2103.03841).
- Inception Score: logits without the bias of the last layer, in blocks of 5,000 pictures in their order (arXiv
  1606.03498). So the classes must be mixed within a block: of pictures in the order of their classes the score is low.
- Precision and recall: see `precision_recall`.

One pass over the pictures, in a stream: sums in float64, and for precision and recall the features of every picture (8
KiB each). Training and `fvq_jax.evaluate` share it. Where the pictures come from is left to the caller.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from fvq_jax.evals.frechet import FeatureStatistics, frechet_distance
from fvq_jax.evals.inception_score import InceptionScore
from fvq_jax.evals.precision_recall import DISTANCES, check_enough, precision_recall
from fvq_jax.evals.reference import Moments
from fvq_jax.models.frozen.inception import CLASSES, FEATURES, SPATIAL, SPATIAL_FEATURES
from fvq_jax.runtime.agreement import everywhere
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.hosts import rows_of_all_hosts, sum_over_hosts

POOLED_FEATURES = FEATURES[-1]
SCORE_BLOCK = 5_000  # pictures in a block of the Inception Score
# uint8 pictures -> features by name, see `inception.load_inception(path, spatial=True)`.
Inception = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """What the scores need of a set of pictures; the same on every host.

    Attributes:
      images: how many pictures.
      pooled, spatial: statistics of the features of FID and of sFID.
      inception_score: the sums of the Inception Score, a split for every block of 5,000 pictures.
      features: of FID, of every picture [images, 2048], in order; None if they were not kept.
    """

    images: int
    pooled: FeatureStatistics
    spatial: FeatureStatistics
    inception_score: InceptionScore
    features: Float32[np.ndarray, "images d"] | None

    def gaussian(self) -> Moments | Float32[np.ndarray, "images d"]:
        """Mean and covariance of the features of FID, or these features themselves if that is quicker.

        `frechet_distance` takes either, and finds the same. Of fewer pictures than dimensions the covariance is
        singular, and takes many times as long. InputError for fewer than two pictures.
        """
        if self.features is not None and 2 <= len(self.features) < self.features.shape[1]:
            return self.features
        return self.pooled.moments()


@dataclasses.dataclass(frozen=True)
class Reference:
    """The real pictures that samples are compared with.

    Attributes:
      pooled: the features of FID, see `PictureSet.gaussian`.
      spatial: mean and covariance of the features of sFID; None if they are not known.
      features: of FID, of every picture [images, 2048]; None if only statistics are known: then there are no precision
        and recall.
    """

    pooled: Moments | Float32[np.ndarray, "_ d"]
    spatial: Moments | None
    features: Float32[np.ndarray, "images d"] | None

    @classmethod
    def of(cls, pictures: PictureSet) -> "Reference":
        """The reference that these pictures are. InputError for fewer than two."""
        return cls(pictures.gaussian(), pictures.spatial.moments(), pictures.features)

    @property
    def images(self) -> int | None:
        """How many pictures precision and recall compare with; None if there are none."""
        return None if self.features is None else len(self.features)


def collect(
    batches: Iterable[UInt8[np.ndarray, "_ H W 3"]],
    inception: Inception,
    *,
    images: int,
    batch_size: int,
    keep_features: bool = True,
    progress: Callable[[int], Any] = lambda done: None,
) -> PictureSet:
    """One pass over pictures, over all hosts.

    Args:
      batches: this host's pictures, at most `batch_size` at a time, each time of the same size. Of several hosts, batch
        s of host h holds the pictures from position (s * hosts + h) * `batch_size` on; each position is one host's.
      inception: what computes features.
      images: how many pictures there are in all, at least; decides how many blocks the Inception Score has.
      batch_size: of one host. The network is compiled for it once: smaller batches are padded.
      keep_features: whether to keep the features that precision and recall need.
      progress: called after every batch with how many pictures it had, on this host.

    Raises:
      InputError: there is no picture, or a feature is not finite.
    """
    hosts, host = jax.process_count(), jax.process_index()
    pooled = FeatureStatistics.empty(POOLED_FEATURES)
    spatial = FeatureStatistics.empty(SPATIAL_FEATURES)
    score = InceptionScore.empty(CLASSES, max(1, -(-images // SCORE_BLOCK)))
    kept, positions = [np.zeros((0, POOLED_FEATURES), np.float32)], [np.zeros(0, np.int64)]

    def go_through() -> None:
        for step, batch in enumerate(batches):
            count = len(batch)
            if count:
                position = (step * hosts + host) * batch_size + np.arange(count)
                padded = np.concatenate([batch, np.repeat(batch[:1], batch_size - count, axis=0)])
                outputs = {name: values[:count] for name, values in inception(padded).items()}
                pooled.add(outputs[str(POOLED_FEATURES)])
                spatial.add(outputs[SPATIAL])
                score.add(outputs["logits_unbiased"], np.minimum(position // SCORE_BLOCK, len(score.count) - 1))
                positions.append(position)
                if keep_features:
                    kept.append(outputs[str(POOLED_FEATURES)])
            progress(count)

    everywhere(go_through)
    sums = sum_over_hosts((pooled, spatial, score))
    count = int(sums[0].count)
    if not count:
        raise InputError("there are no pictures to score")
    features = _in_order(np.concatenate(kept), np.concatenate(positions)) if keep_features else None
    return PictureSet(count, *sums, features)


def compare(
    samples: PictureSet,
    reference: Reference,
    *,
    distances: str = "float32",
    progress: Callable[[int], Any] = lambda pairs: None,
) -> dict[str, float]:
    """The scores of samples by name; those that need what the reference does not have are left out.

    `fid`, `sfid`, `inception_score` with `inception_score_std` (over blocks of 5,000), `precision` and `recall`, the
    last two with `distances` as in `precision_recall`, which also explains `progress`.

    Raises:
      InputError: too few samples or reference pictures, or features that do not fit.
    """
    check_enough(samples.images, "samples")
    scores = {"fid": frechet_distance(reference.pooled, samples.gaussian())}
    if reference.spatial is not None:
        scores["sfid"] = frechet_distance(reference.spatial, samples.spatial.moments())
    scores["inception_score"], scores["inception_score_std"] = samples.inception_score.result()
    if reference.features is not None and samples.features is not None:
        found = precision_recall(reference.features, samples.features, distances=distances, progress=progress)
        scores["precision"], scores["recall"] = found
    return scores


def score(
    batches: Iterable[UInt8[np.ndarray, "_ H W 3"]],
    reference: Reference,
    inception: Inception,
    *,
    images: int,
    batch_size: int,
    distances: str = "float32",
    progress: Callable[[int], Any] = lambda done: None,
) -> dict[str, float]:
    """Scores pictures that come in batches: `collect`, then `compare`, whose arguments these are."""
    keep = reference.features is not None
    samples = collect(batches, inception, images=images, batch_size=batch_size, keep_features=keep, progress=progress)
    return compare(samples, reference, distances=distances)


def not_computed(reference: Reference) -> dict[str, str]:
    """Which scores `compare` leaves out for this reference, and why."""
    missing = {}
    if reference.spatial is None:
        missing["sfid"] = "the reference has no statistics of sFID's features (mu_s, sigma_s)"
    if reference.features is None:
        missing |= dict.fromkeys(
            ("precision", "recall"), "the reference holds only statistics: they need its pictures (arr_0)"
        )
    return missing


def protocol(distances: str, pixels: str) -> dict[str, str]:
    """How samples are scored, in short and in a sentence, to stand beside every figure.

    `pixels` says where the 8-bit pixels come from: `stored`, or how floats are converted (`round`, `truncate`).
    """
    stored = "pixels as stored" if pixels == "stored" else f"pixels converted to 8 bits ({pixels})"
    return {
        "protocol": f"adm, {distances} distances, uint8 {pixels}",
        "protocol_means": (
            f"as ADM's evaluation suite: {stored}, InceptionV3 of 2015-12-05 with TensorFlow 1's resize, Inception "
            f"Score over blocks of {SCORE_BLOCK:,} in order, precision and recall with {DISTANCES[distances]}"
        ),
    }


def _in_order(features: Float32[np.ndarray, "n d"], positions: np.ndarray) -> Float32[np.ndarray, "m d"]:
    """The features of the pictures of all hosts, in the order of their positions."""
    if jax.process_count() == 1:
        return features
    most = int(rows_of_all_hosts(np.array([len(features)])).max())
    padding = most - len(features)
    positions = rows_of_all_hosts(np.pad(positions, (0, padding), constant_values=-1))
    everything = rows_of_all_hosts(np.pad(features, ((0, padding), (0, 0))))
    real = positions >= 0
    return everything[real][np.argsort(positions[real], kind="stable")]
