"""Which pictures of an evaluation are kept to be looked at: some spread over the set, the worst and the best.

Nothing else is kept per picture, so memory does not grow with their number. The choice depends on the scores and the
order of the pictures alone, not on batches or hosts. Drawing is left to `fvq_jax.report`.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int, UInt8

from fvq_jax.evals.metric_table import METRICS
from fvq_jax.runtime.hosts import rows_of_all_hosts, sum_over_hosts

EXTREMES = 6  # how many of the worst pictures are kept, and of the best
RANKED_BY = ("lpips_vgg", "lpips_alex", "psnr")  # the first of these that was computed ranks pictures


@dataclasses.dataclass(frozen=True)
class Example:
    """One scored picture: its position in the evaluation, name, scores by metric, original and reconstruction."""

    position: int
    name: str
    scores: dict[str, float]
    original: UInt8[np.ndarray, "H W 3"]
    reconstruction: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Examples:
    """The pictures that were kept; `worst` and `best`, worst and best first, by the metric `ranked_by`."""

    spread: Sequence[Example]
    worst: Sequence[Example]
    best: Sequence[Example]
    ranked_by: str


class ExampleCollector:
    """Chooses among `total` pictures as they are scored: `spread` evenly spaced, the `EXTREMES` worst and best.

    `name` says what the picture at a position is called.
    """

    def __init__(self, spread: int, total: int, name: Callable[[int], str]):
        self._name = name
        self._spread = {index * total // spread for index in range(spread)}
        self._kept = {"spread": _Smallest(spread), "worst": _Smallest(EXTREMES), "best": _Smallest(EXTREMES)}
        self._metrics: list[str] = []

    def add(
        self,
        positions: Int[np.ndarray, "n"],
        scores: Mapping[str, np.ndarray],
        originals: UInt8[np.ndarray, "n H W 3"],
        reconstructions: UInt8[np.ndarray, "n H W 3"],
    ) -> None:
        """Considers pictures: their positions in the set, scores [n] by metric, originals and reconstructions."""
        self._metrics = sorted(scores)
        sign = 1 if METRICS[self._ranked_by].larger_is_better else -1
        for row, position in enumerate(positions.tolist()):
            score = sign * float(scores[self._ranked_by][row])
            quality = -math.inf if math.isnan(score) else score
            keys = {"worst": quality, "best": -quality}
            if position in self._spread:
                keys["spread"] = 0.0
            for kind, key in keys.items():
                if self._kept[kind].takes(key, position):
                    own = {name: float(values[row]) for name, values in scores.items()}
                    # Copies, so that no whole batch stays in memory.
                    pictures = originals[row].copy(), reconstructions[row].copy()
                    example = Example(position, self._name(position), own, *pictures)
                    self._kept[kind].insert(key, example)

    def result(self, size: int) -> Examples:
        """The examples among the pictures of all hosts, `size` pixels along a side; every host gets the same."""
        chosen = {kind: kept.over_hosts(self._metrics, size, self._name) for kind, kept in self._kept.items()}
        return Examples(**chosen, ranked_by=self._ranked_by)

    @property
    def _ranked_by(self) -> str:
        return next(name for name in RANKED_BY if name in self._metrics)


class _Smallest:
    """The `count` examples with the smallest keys; among equal keys the earlier position comes first."""

    def __init__(self, count: int):
        self._count = count
        self._kept: list[tuple[float, int, Example]] = []

    def takes(self, key: float, position: int) -> bool:
        return len(self._kept) < self._count or (key, position) < self._kept[-1][:2]

    def insert(self, key: float, example: Example) -> None:
        bisect.insort(self._kept, (key, example.position, example))
        del self._kept[self._count :]

    def over_hosts(self, metrics: Sequence[str], size: int, name: Callable[[int], str]) -> list[Example]:
        """The `count` examples with the smallest keys over all hosts; each host holds its own."""
        if jax.process_count() == 1:
            return [example for *_, example in self._kept]
        keys = np.full((self._count, 2), math.inf)
        for row, (key, position, _) in enumerate(self._kept):
            keys[row] = key, position
        everyone = sorted(map(tuple, rows_of_all_hosts(keys)))[: self._count]
        positions = [int(position) for _, position in everyone if position < math.inf]
        # Only the chosen examples travel, as sums over hosts: the host that has an example adds it, the others add 0.
        scores = np.zeros((len(positions), len(metrics)))
        pixels = np.zeros((2, len(positions), size, size, 3), np.uint8)
        here = {position: example for _, position, example in self._kept}
        for row, position in enumerate(positions):
            if position in here:
                scores[row] = [here[position].scores[name] for name in metrics]
                pixels[:, row] = here[position].original, here[position].reconstruction
        scores, pixels = sum_over_hosts((scores, pixels))
        return [
            Example(position, name(position), dict(zip(metrics, map(float, values), strict=True)), *pair)
            for position, values, *pair in zip(positions, scores, *pixels, strict=True)
        ]
