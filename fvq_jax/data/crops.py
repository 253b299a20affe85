"""Many random crops of few pictures, as a source: measuring the usage of many codes needs many tokens."""

import dataclasses

import numpy as np

from fvq_jax.data.decode import open_stored
from fvq_jax.data.record import Record, Source
from fvq_jax.data.transforms import random_resize_crop


@dataclasses.dataclass(frozen=True)
class RandomCrops:
    """`count` square crops of `size` pixels; every picture is cropped equally often, give or take one.

    Of more pictures than crops as many are taken as there are crops, evenly spaced: the first ones of a source would be
    of few classes. Crop i is always the same for a `seed`. Crops are resized and placed as in training, see
    `transforms.random_resize_crop`, and not mirrored.
    """

    source: Source
    count: int
    size: int
    resize_min: int = 0
    resize_max: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    @property
    def pictures(self) -> int:
        """How many different pictures the crops are of."""
        return min(self.count, len(self.source))

    def __getitem__(self, index: int) -> Record:
        record = self.source[self._picture(index)]
        # Without resizing the crop is of the pixels as they are stored.
        image = open_stored(record["image"], self.resize_max if self.resize_min else 0)
        rng = np.random.default_rng((self.seed, index))
        crop = random_resize_crop(image, rng, self.size, self.resize_min, self.resize_max)
        return {**record, "image": crop, "small": min(image.size) < self.size}

    def name(self, index: int) -> str:
        """The picture that crop `index` is cut from."""
        return self.source.name(self._picture(index))

    def _picture(self, index: int) -> int:
        return index % self.pictures if self.count >= len(self.source) else index * len(self.source) // self.count

    def fingerprint(self) -> str:
        """The pictures, and everything that decides on the crops."""
        resized = f"resized to {self.resize_min}..{self.resize_max}" if self.resize_min else "not resized"
        return f"{self.count} crops of {self.size} pixels, {resized}, seed {self.seed}, of {self.source.fingerprint()}"
