"""Which pictures, or codes of pictures, an evaluation looks at, and in which order."""

import dataclasses
import functools
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import grain

from fvq_jax.data.codes import CodeInfo, CodeRecord, CodeSource

R = TypeVar("R", covariant=True)


@runtime_checkable
class Records(Protocol[R]):
    """Any source of records by index: of pictures (`record.Source`) or of codes (`codes.CodeSource`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> R:
        """Record `index`."""
        ...

    def name(self, index: int) -> str:
        """What to call record `index`."""
        ...

    def fingerprint(self) -> str:
        """Changes with the records, not with where they lie."""
        ...


@dataclasses.dataclass(frozen=True)
class Sample(Generic[R]):
    """`count` records, evenly spaced over a source, in a pseudo-random order that only their number decides.

    Sources list one class after the other. The order is shuffled because some scores (the Inception Score, here or in
    a program that reads the saved reconstructions) are means over consecutive parts, in which classes must be mixed.
    The records are evenly spaced because the first `count` of a source would be of few classes.
    """

    source: Records[R]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> R:
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


@dataclasses.dataclass(frozen=True)
class CodeSample(Sample[CodeRecord]):
    """A sample of codes, which is a source of codes."""

    source: CodeSource

    @property
    def info(self) -> CodeInfo:
        """What the codes are."""
        return self.source.info
