"""What the pipeline gets from a source: single pictures with labels, by index."""

from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8


class Record(TypedDict):
    """One picture as it is stored, and its class index.

    `image` is the content of a picture file, or pixels, uint8 [H, W, 3]. The pipeline decodes: it knows what will be
    made of the picture. `small` is there if the source has cut the pixels itself: did it enlarge the picture.
    """

    image: bytes | UInt8[np.ndarray, "H W 3"]
    label: np.int32
    small: NotRequired[bool]


@runtime_checkable
class Source(Protocol):
    """What the pipeline asks of a source. Each index 0..len-1 must always give the same record.

    A source is sent to worker processes, so it must be small when pickled.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`. OSError or UnreadableImageError if it cannot be read; the pipeline counts such records."""

    def name(self, index: int) -> str:
        """What to call record `index` in a log line."""

    def fingerprint(self) -> str:
        """Changes with the pictures, not with where they lie: a resumed run must see the same ones."""
