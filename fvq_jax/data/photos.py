"""Photographs that ship inside scikit-image and scikit-learn, as a source: a real run that needs no data set."""

import dataclasses
import importlib.util
import pathlib
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from fvq_jax.data.decode import read_image
from fvq_jax.data.record import Record
from fvq_jax.runtime.errors import InputError

# (package, file, (left, top, right, bottom)); the last is the part to use, None for all of it. Colour photographs only.
# motorcycle_left is one of a stereo pair; motorcycle_right is left out, since it shows the regions that the left one
# holds out. The retina is cut to the square inside its round aperture.
_PHOTOS = (
    ("skimage", "data/astronaut.png", None),
    ("skimage", "data/chelsea.png", None),
    ("skimage", "data/coffee.png", None),
    ("skimage", "data/motorcycle_left.png", None),
    ("skimage", "data/rocket.jpg", None),
    ("skimage", "data/retina.jpg", (218, 218, 1193, 1193)),
    ("skimage", "data/hubble_deep_field.jpg", None),
    ("skimage", "data/ihc.png", None),
    ("sklearn", "datasets/images/china.jpg", None),
    ("sklearn", "datasets/images/flower.jpg", None),
)
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_CROPS_PER_TILE = 4
_EVAL_SEED = 250910140


@dataclasses.dataclass(frozen=True)
class _Photo:
    name: str
    pixels: UInt8[np.ndarray, "H W 3"]
    side: int  # of a tile, in pixels
    tiles: list[tuple[int, int]]  # (top, left) of the tiles of this split


class PhotoSource:
    """Photographs bundled with scikit-image and scikit-learn, cut into tiles. One tile in five is held out.

    The side of a tile is twice `image_size` (less where a photograph would give fewer than five tiles). Crops
    stay inside one tile, so no pixel trained on is ever evaluated on. The held-out tiles form a fixed
    lattice over each photograph. Photographs too small for one tile of each split are left out. Labels
    number the rest.

    `train` yields whole tiles, to be cropped at random. Every photograph comes equally often, and so does every
    tile of one photograph, give or take one. The length, which is one epoch, is four times the number of photographs
    times the most tiles that one of them has (7,200 at 32 pixels). `eval` yields `eval_images` crops of `image_size`,
    the same on every machine and in every run; a smaller number gives the first of them.

    Raises InputError if `image_size` leaves no photograph or a package with photographs is missing.
    """

    def __init__(self, image_size: int, split: Literal["train", "eval"], eval_images: int = 2048):
        self._image_size = image_size
        self._split = split
        self._photos: list[_Photo] = []
        largest = 0
        for package, file, box in _PHOTOS:
            pixels = read_image(_package_folder(package) / file)
            if box is not None:
                left, top, right, bottom = box
                pixels = pixels[top:bottom, left:right]
            height, width = pixels.shape[:2]
            side_of_two_tiles = max(min(height, width // 2), min(height // 2, width))
            largest = max(largest, side_of_two_tiles)
            if image_size <= side_of_two_tiles:
                side = _tile_side(height, width, image_size)
                tiles = _tile_corners(height, width, side, held_out=split == "eval")
                self._photos.append(_Photo(pathlib.PurePath(file).name, pixels, side, tiles))
        if not self._photos:
            raise InputError(
                f"data.image_size={image_size} is too large for the bundled photographs: at most {largest} leaves "
                "a region to evaluate on; use data.source='folder' for larger pictures"
            )
        self.classes = [pathlib.PurePath(photo.name).stem for photo in self._photos]
        if split == "train":
            most_tiles = max(len(photo.tiles) for photo in self._photos)
            self._length = len(self._photos) * most_tiles * _CROPS_PER_TILE
        else:
            self._length = eval_images

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        turn, label = divmod(index, len(self._photos))
        photo = self._photos[label]
        size = photo.side
        if self._split == "train":
            top, left = photo.tiles[turn % len(photo.tiles)]
        else:
            rng = np.random.default_rng((_EVAL_SEED, index))
            top, left = photo.tiles[rng.integers(len(photo.tiles))]
            down, right = rng.integers(size - self._image_size + 1, size=2)
            top, left, size = top + down, left + right, self._image_size
        image = photo.pixels[top : top + size, left : left + size]
        return {"image": image, "label": np.int32(label)}

    def fingerprint(self) -> str:
        """How many crops of which size; the photographs are always the same."""
        return f"{len(self)} crops of {self._image_size} pixels"

    def name(self, index: int) -> str:
        """File name of the photograph that record `index` is cut from."""
        return self._photos[index % len(self._photos)].name


def _package_folder(package: str) -> pathlib.Path:
    """Folder of an installed package, found without importing it (scikit-learn takes seconds)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = _DISTRIBUTIONS[package]
        raise InputError(f"data.source='photos' needs the package {name}: pip install {name}")
    return pathlib.Path(spec.submodule_search_locations[0])


def _tile_side(height: int, width: int, image_size: int) -> int:
    """The largest side, up to twice the crop, that gives five tiles; else the largest that gives two."""
    sides = range(2 * image_size, image_size - 1, -1)
    counts = {side: (height // side) * (width // side) for side in sides}
    return next(side for enough in (5, 2) for side in sides if counts[side] >= enough)


def _tile_corners(height: int, width: int, side: int, *, held_out: bool) -> list[tuple[int, int]]:
    """(top, left) of the tiles of one split; every fifth of each row and column of the grid is held out."""
    return [
        (row * side, column * side)
        for row in range(height // side)
        for column in range(width // side)
        if ((2 * row + column) % 5 == 0) == held_out
    ]
