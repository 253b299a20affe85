"""Which pictures an evaluation looks at, and in which order."""

import dataclasses
import functools
from typing import Any

import grain

from fvq_jax.data.record import Record, Source


@dataclasses.dataclass(frozen=True)
class Sample:
    """`count` records, evenly spaced over a source, in a pseudo-random order that only their number decides.

    Sources list one class after the other. The order is shuffled because some scores (the Inception Score, here or in
    a program that reads the saved reconstructions) are means over consecutive parts, in which classes must be mixed.
    The records are evenly spaced because the first `count` of a source would be of few classes.
    """

    source: Source
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Record:
        return self.source[self.index(position)]

    def name(self, position: int) -> str:
        """What the source calls the record at a position."""
        return self.source.name(self.index(position))

    def fingerprint(self) -> str:
        """The source's fingerprint, and how many of its records these are."""
        return f"{self.count} of {self.source.fingerprint()}"

    @functools.cached_property
    def _order(self) -> Any:
        return grain.MapDataset.range(self.count).seed(0).shuffle()

    def index(self, position: int) -> int:
        """The index in the source of the record at a position."""
        return int(self._order[position]) * len(self.source) // self.count
