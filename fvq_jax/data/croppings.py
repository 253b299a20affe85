"""Which crops of a picture become codes: one of the centre, ten fixed ones, or some at random; each at every scale."""

import dataclasses
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fvq_jax.data.transforms import random_flip, random_resize_crop, resize_center
from fvq_jax.runtime.errors import InputError, require

# Unless scales are given. LlamaGen takes ten crops at these two scales; None crops the picture as it is.
_SCALES: dict[str, tuple[float | None, ...]] = {"center": (1.0,), "ten": (1.1, 1.05), "random": (None,)}
_LARGEST_SCALE = 16


@dataclasses.dataclass(frozen=True)
class Cropping:
    """All crops of a picture.

    Attributes:
      kind: "center", the middle of ADM's central square (arXiv 2105.05233); "ten", its corners (top left, top right,
        bottom left, bottom right) and its middle, then the same of the mirrored square, as LlamaGen does (arXiv
        2406.06525); or "random", places drawn uniformly, half of the crops mirrored.
      crops: how many there are at every scale.
      scales: at scale s the shorter side of the picture becomes int(s * size) pixels before it is cropped. None in it,
        for random crops only, crops the picture as it is.
      size: side of a crop, in pixels.
      seed: of random crops: number n of picture i is drawn from (seed, i, n).
    """

    kind: str
    crops: int
    scales: tuple[float | None, ...]
    size: int
    seed: int = 0

    @classmethod
    def parse(cls, crops: str, scales: str | None, size: int, seed: int = 0) -> "Cropping":
        """The crops that command-line options name: `crops` is center, ten or random:N, `scales` is 1.1,1.05 for
        instance. None, or an empty text, gives the scales of LlamaGen for ten crops, 1 for the centre, and no resizing
        for random crops. Raises InputError for what cannot be.
        """
        found = re.fullmatch(r"(center|ten)|random:(\d{1,6})", crops)
        require(
            found is not None and found[2] != "0",
            f"--crops={crops} cannot be: use center, ten, or random:N with the number of crops",
        )
        assert found is not None
        require(0 <= seed < 2**32, f"--seed={seed} cannot be: use 0 to {2**32 - 1}")
        kind = found[1] or "random"
        try:
            values = tuple(map(float, scales.split(","))) if scales else _SCALES[kind]
        except ValueError:
            raise InputError(f"--scales={scales} cannot be: give numbers such as 1.1,1.05") from None
        require(
            all(value is None or 1 <= value <= _LARGEST_SCALE for value in values),
            f"--scales={scales} cannot be: a scale is 1 to {_LARGEST_SCALE}, the shorter side of the picture in units "
            "of --size",
        )
        require(size > 0, f"--size {size} cannot be: give the side of a crop, in pixels")
        count = {"center": 1, "ten": 10, "random": int(found[2] or 0)}[kind]
        return cls(kind, count, values, size, seed if kind == "random" else 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `cut` returns: [scales, crops, size, size, 3]."""
        return (len(self.scales), self.crops, self.size, self.size, 3)

    @property
    def min_side(self) -> int:
        """No side may be decoded shorter than this many pixels, see `decode.open_image`; 0: decode as it is.

        Random crops are cut as in training, where the decoder may leave out what is averaged away. The other croppings
        are published recipes that start from the whole picture.
        """
        if self.kind != "random" or None in self.scales:
            return 0
        return max(self._side(scale) for scale in self.scales)

    def cut(self, image: Image.Image, index: int) -> UInt8[np.ndarray, "scales crops s s 3"]:
        """The crops of picture number `index`."""
        at = {"center": self._center, "ten": self._ten, "random": self._random}[self.kind]
        return np.stack([np.stack(at(image, index, number)) for number in range(len(self.scales))])

    def _side(self, scale: float | None) -> int:
        return int(self.size * scale) if scale else 0

    def _center(self, image: Image.Image, index: int, number: int) -> list[np.ndarray]:
        square = resize_center(image, self._side(self.scales[number]))
        return _five(square, self.size)[4:]

    def _ten(self, image: Image.Image, index: int, number: int) -> list[np.ndarray]:
        square = resize_center(image, self._side(self.scales[number]))
        return _five(square, self.size) + _five(square[:, ::-1], self.size)

    def _random(self, image: Image.Image, index: int, number: int) -> list[np.ndarray]:
        side = self._side(self.scales[number])
        crops = []
        for crop in range(number * self.crops, (number + 1) * self.crops):
            rng = np.random.default_rng((self.seed, index, crop))
            crops.append(random_flip(random_resize_crop(image, rng, self.size, side, side), rng))
        return crops


def _five(square: UInt8[np.ndarray, "S S 3"], size: int) -> list[np.ndarray]:
    """Top left, top right, bottom left, bottom right, middle. A middle between two pixels is rounded to the even one,
    as torchvision does.
    """
    end = len(square) - size
    middle = round(end / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    return [square[top : top + size, left : left + size] for top, left in corners]
