"""Pictures that a generator draws while they are scored, so that none of them is ever stored."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from fvq_jax.inference.generator import Generator
from fvq_jax.ops.pixels import to_uint8
from fvq_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class DrawnPictures:
    """`count` samples, as a `data.stored_pictures.StoredPictures`; the same ones every time.

    Image i is of class i modulo the number of classes, so that all classes come equally often and lie mixed.

    Attributes:
      generator: one with a tokenizer.
      count: how many samples.
      seed: of all samples.
      options: how codes are drawn, see `Generator.sample`.
      rounding: how pixels become 8-bit, see `ops.pixels.to_uint8`.
    """

    generator: Generator
    count: int
    seed: int
    options: Mapping[str, Any]
    rounding: str

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, if the generator knows them."""
        return self.generator.provenance.class_names

    @property
    def labels(self) -> Int64[np.ndarray, "n"]:
        """The class of every sample."""
        return np.arange(self.count) % self.generator.net.classes

    @property
    def shape(self) -> tuple[int, ...]:
        """[count, H, W, 3]."""
        tokenizer = self.generator.tokenizer
        assert tokenizer is not None
        height, width = (side * tokenizer.downsampling for side in self.generator.net.grid)
        return self.count, height, width, 3

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, *, part: int = 0, parts: int = 1) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Draws the samples in order; of several hosts, each draws every `parts`-th batch.

        InputError if the pictures are not finite.
        """
        labels = self.labels
        for start in range(part * size, self.count, parts * size):
            numbers = np.arange(start, min(start + size, self.count))
            images = self.generator.sample(labels[numbers], self.seed, numbers=numbers, **self.options)
            if not np.isfinite(images).all():
                raise InputError(f"the samples of {self.generator} are not finite: its weights are broken")
            yield np.asarray(to_uint8(images, self.rounding))
