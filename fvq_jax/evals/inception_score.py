"""The Inception Score of a whole set of pictures, collected in a stream; float64 on the host.

Scores of single pictures are in `pixel_metrics`, distances between sets in `frechet`.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Float64, Int

SPLITS = 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class InceptionScore:
    """Running sums of the Inception Score (arXiv 1606.03498); those of disjoint sets simply add up.

    The score is exp of the mean divergence between each picture's class probabilities p and their mean over the
    pictures: E[sum p log p] - sum E[p] log E[p]. As usual it is computed for parts of the set, `SPLITS` of them unless
    told otherwise; the classes must be mixed in each part.

    Attributes:
      count: pictures in each split [s].
      negentropy: sum over the pictures of sum p log p [s].
      probabilities: sum over the pictures of p [s, classes].
    """

    count: Float64[np.ndarray, "s"]
    negentropy: Float64[np.ndarray, "s"]
    probabilities: Float64[np.ndarray, "s classes"]

    @classmethod
    def empty(cls, classes: int, splits: int = SPLITS) -> "InceptionScore":
        """The sums of no pictures."""
        return cls(np.zeros(splits), np.zeros(splits), np.zeros((splits, classes)))

    def add(self, logits: Float[np.ndarray, "n classes"], split: Int[np.ndarray, "n"]) -> None:
        """Counts pictures in, each in its split, counted from 0."""
        logits = logits.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(axis=1, keepdims=True))
        probabilities = np.exp(logits - log_sum)
        negentropy = np.sum(probabilities * (logits - log_sum), axis=1)
        for part in np.unique(split):
            inside = split == part
            self.count[part] += inside.sum()
            self.negentropy[part] += negentropy[inside].sum()
            self.probabilities[part] += probabilities[inside].sum(axis=0)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits that hold a picture (one picture alone scores 1)."""
        filled = self.count > 0
        count = self.count[filled]
        mean = self.probabilities[filled] / count[:, None]
        of_mean = np.sum(mean * np.log(np.where(mean > 0, mean, 1.0)), axis=1)
        scores = np.exp(self.negentropy[filled] / count - of_mean)
        return float(scores.mean()), float(scores.std())
