"""Which pictures an evaluation looks at, and in which order."""

import dataclasses
import functools
from typing import Any

import grain

from fvq_jax.data.record import Record, Source


@dataclasses.dataclass(frozen=True)
class Sample:
    """`count` records, evenly spaced over a source, in a pseudo-random order that only their number decides.

    Sources list class after class: what is scored in consecutive parts, as the Inception Score is, here or by whoever
    reads the reconstructions, needs the classes mixed. Evenly spaced, since the first ones would be of few classes.
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
        """The source's, and how many of its records these are."""
        return f"{self.count} of {self.source.fingerprint()}"

    @functools.cached_property
    def _order(self) -> Any:
        return grain.MapDataset.range(self.count).seed(0).shuffle()

    def index(self, position: int) -> int:
        """In the source, of the record at a position."""
        return int(self._order[position]) * len(self.source) // self.count
