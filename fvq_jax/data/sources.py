"""Where pictures come from: random-access sources of single records for Grain.

Every source maps an index to a `Record`, reads nothing but local files, and is small enough to be sent to
worker processes. Order, augmentation, batching and the share of each host are the business of `pipeline`.
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
from typing import Literal, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from fvq_jax.data import transforms
from fvq_jax.errors import InputError


class Record(TypedDict):
    """One picture.

    `image` is uint8 [H, W, 3], `label` a class index, `corrupt` the index of the unreadable file this
    record stands in for, or -1. The latter travels inside the batch because worker processes share no
    memory with the one that counts.
    """

    image: UInt8[np.ndarray, "H W 3"]
    label: np.int32
    corrupt: np.int64
    mask: NotRequired[np.bool_]


@runtime_checkable
class Source(Protocol):
    """What the pipeline asks of a source, besides indices 0..len-1 that always give the same record."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name(self, index: int) -> str:
        """What to call record `index` in a log line."""

    def fingerprint(self) -> str:
        """Changes with the list of pictures, not with where they lie: a resumed run must see the same one."""


# (package, file, (left, top, right, bottom)). Colour photographs only. Of the stereo pair motorcycle_left /
# _right one is used, since the other shows what the first holds out; of the retina the square inside the
# round aperture.
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
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
# What files with these endings turn out to hold; none of Pillow's rarer formats, one of which runs a program.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@dataclasses.dataclass(frozen=True)
class _Photo:
    name: str
    pixels: UInt8[np.ndarray, "H W 3"]
    side: int  # of a tile
    tiles: list[tuple[int, int]]  # (top, left) of those of the split


class PhotoSource:
    """Photographs bundled with scikit-image and scikit-learn, in tiles of which one in five is held out.

    A tile is a square of twice `image_size` (less where a photograph would give fewer than five). Crops
    stay inside one tile, so no pixel trained on is ever evaluated on. The held-out tiles form a fixed
    lattice over each photograph. Photographs too small for one tile of each split are left out. Labels
    number the rest.

    `train` yields whole tiles, to be cropped at random: photographs equally often, the tiles of one
    photograph equally often up to rounding. Its length, one epoch, is the number of photographs times four
    times the tiles of the largest (7,200 at 32 pixels). `eval` yields `eval_images` crops of `image_size`,
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
        return {"image": image, "label": np.int32(label), "corrupt": np.int64(-1)}

    def fingerprint(self) -> str:
        """How many crops of which size; the photographs are always the same."""
        return f"{len(self)} crops of {self._image_size} pixels"

    def name(self, index: int) -> str:
        """File name of the photograph that record `index` is cut from."""
        return self._photos[index % len(self._photos)].name


class FolderSource:
    """Every JPEG, PNG and WebP file of a directory tree, in the same order on every machine.

    The class of a file is the first folder on its way from `root`; classes are numbered in the order of
    their names. Files directly in `root` form a class of their own, number 0. Hidden files and folders and
    other file types are ignored, symbolic links followed.

    A file that cannot be decoded, or that is so large that Pillow takes it for an attack, is replaced by
    the next readable one, and its index noted in `corrupt`. Raises InputError for a root that is not a
    readable folder or holds no picture.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self._root = os.path.abspath(root)
        if not os.path.isdir(self._root):
            raise InputError(f"image folder {str(root)!r} does not exist or is not a folder")
        files = sorted(_image_files(self._root), key=lambda path: path.split(os.sep))
        if not files:
            endings = ", ".join(_IMAGE_ENDINGS)
            raise InputError(f"image folder {str(root)!r} holds no file that ends in one of {endings}")
        folders = [path.split(os.sep)[0] if os.sep in path else "" for path in files]
        self.classes = sorted(set(folders))
        if len(self.classes) > 1 and self.classes[0] == "":
            logging.warning(
                "%s holds pictures beside its class folders: %d of them, such as %r, become class 0",
                self._root,
                folders.count(""),
                files[folders.index("")],
            )
        number = {name: label for label, name in enumerate(self.classes)}
        self._files = files
        self._labels = np.array([number[name] for name in folders], np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            image = self._read(candidate)
            if image is not None:
                corrupt = np.int64(-1 if candidate == index else index)
                return {"image": image, "label": self._labels[candidate], "corrupt": corrupt}
        raise InputError(f"none of the {len(self)} files in {self._root!r} is a readable picture")

    def fingerprint(self) -> str:
        """How many files, and a hash of their names below the root, in order."""
        names = "\n".join(self._files).encode("utf-8", "surrogateescape")
        return f"{len(self)} files, names {hashlib.sha256(names).hexdigest()[:16]}"

    def name(self, index: int) -> str:
        """Full path of file `index`."""
        return os.path.join(self._root, self._files[index])

    def _read(self, index: int) -> UInt8[np.ndarray, "H W 3"] | None:
        # Pillow reports damage by OSError, SyntaxError, ValueError, struct.error and more, depending on the
        # format.
        try:
            return read_image(self.name(index))
        except Exception:
            return None


def make_source(
    source: str,
    split: Literal["train", "eval"],
    *,
    image_size: int,
    train_dir: str,
    eval_dir: str,
    eval_images: int,
) -> Source:
    """The source a config names: `photos` or `folder`, for training or for evaluation.

    `eval_images` is the number of crops cut for `photos` (0: 2,048); a folder is listed whole (see `limit`
    of `eval_batches`). Listing a large one takes a while: make a source once, for every evaluation.
    """
    if source == "photos":
        return PhotoSource(image_size, split, eval_images or 2048)
    if source == "folder":
        field, root = ("train_dir", train_dir) if split == "train" else ("eval_dir", eval_dir)
        if not root:
            raise InputError(f"data.source='folder' needs data.{field}: set it to a folder of JPEG, PNG or WebP files")
        return FolderSource(root)
    raise InputError(f"data.source={source!r} is unknown: use 'photos' or 'folder'")


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """Upright 8-bit RGB pixels of a file, of an animation its first frame; raises whatever Pillow does."""
    with Image.open(path, formats=_IMAGE_FORMATS) as image:
        return transforms.to_rgb(image)


def _image_files(root: str) -> list[str]:
    """Paths below `root`, relative to it, of all files that look like pictures, in no particular order."""

    def refuse(error: OSError):
        raise InputError(f"cannot read folder {error.filename!r}: {error.strerror}") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not _links_upwards(os.path.join(folder, name), real)
        ]
        prefix = os.path.relpath(folder, root)
        found += [
            os.path.normpath(os.path.join(prefix, name))
            for name in names
            if not name.startswith(".") and name.lower().endswith(_IMAGE_ENDINGS)
        ]
    return found


def _links_upwards(path: str, folder: str) -> bool:
    """Whether `path`, found in the real folder `folder`, is a link to that or above it: an endless walk."""
    target = os.path.realpath(path)
    return os.path.islink(path) and os.path.commonpath((target, folder)) == target


def _package_folder(package: str) -> pathlib.Path:
    """Folder of an installed package, found without importing it (scikit-learn takes seconds)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = _DISTRIBUTIONS[package]
        raise InputError(f"data.source='photos' needs the package {name}: pip install {name}")
    return pathlib.Path(spec.submodule_search_locations[0])


def _tile_side(height: int, width: int, image_size: int) -> int:
    """Twice the crop, or the largest below it that gives five tiles, or else the largest that gives two."""
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
