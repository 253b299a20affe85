"""Answers questions about a network from the names and shapes of its tensors, and from which of them are copies."""

import collections
import re
from collections.abc import Mapping

import numpy as np

from fvq_jax.runtime.errors import InputError


class Evidence:
    """Answers questions about the names and shapes of the tensors in a checkpoint; `what` is what they should be."""

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str, what: str):
        self._tensors = tensors
        self._shapes = {key: value.shape for key, value in tensors.items()}
        self.source = source
        self._what = what

    def numbers(self, pattern: str) -> list[int]:
        """The numbers that `pattern` finds at the start of names, in order, each once."""
        return sorted({int(match[1]) for key in self._shapes if (match := re.match(pattern, key))})

    def any(self, prefix: str) -> bool:
        """Whether a name starts like this."""
        return any(key.startswith(prefix) for key in self._shapes)

    def count(self, pattern: str) -> int:
        """One more than the largest index that `pattern` finds in the names; 1 if it finds none."""
        return 1 + max(self.numbers(pattern), default=0)

    def alike(self, pattern: str) -> bool:
        """Whether all tensors whose whole name fits hold the same numbers."""
        found = [value for key, value in self._tensors.items() if re.fullmatch(pattern, key)]
        return all(np.array_equal(found[0], other) for other in found[1:])

    def sizes(self, *places: str) -> list[int]:
        """The size of each of the `places` ("NAME AXIS") that exists."""
        shapes = [(self._shapes.get(key, ()), int(axis)) for key, axis in (place.split() for place in places)]
        return [shape[axis] for shape, axis in shapes if len(shape) > axis]

    def size(self, *places: str) -> int:
        """The size that most of the existing `places` have; InputError if none exists or it is 0."""
        votes = collections.Counter(self.sizes(*places))
        size = votes.most_common(1)[0][0] if votes else 0
        if not size:
            raise InputError(f"{self.source} is no {self._what}: it lacks {places[0].split()[0]}, or that is empty")
        return size
