"""Whether samples look like their class: a small classifier, trained on real pictures, looks at them.

No network and no weight file: a few hundred numbers say which colours a picture has and how coarse its structures are,
and a forest of random trees learns which class they go with. It needs seconds on a processor. It suits sets that colour
and texture tell apart, such as crops of a few photographs; it is no measure for ImageNet.
"""

import functools
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int, UInt8

from fvq_jax.runtime.errors import InputError, require

if TYPE_CHECKING:
    from sklearn.ensemble import ExtraTreesClassifier

Images = UInt8[np.ndarray, "n H W 3"]

_TREES, _LEAF = 200, 2
_LEVELS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)  # quantiles of a colour channel
_STEPS = 5  # of each colour in the histogram
_BLOCK, _FREQUENCIES = 8, 3  # cosine transform of blocks of 8 x 8 pixels, its 3 x 3 lowest frequencies
_DIRECTIONS = 8  # of edges
_AT_ONCE = 512  # pictures, which bounds the memory
_FLOOR = 1e-5  # of the mean power of a frequency, before the logarithm


class ClassJudge:
    """Assigns pictures to classes; trained by `fit`. The same pictures always give the same judge.

    What a tokenizer takes from a picture, the finest detail, must not decide: the features leave high frequencies out,
    and every picture is also learned from a smoothed copy.
    """

    def __init__(self, forest: "ExtraTreesClassifier", size: tuple[int, ...]):
        self._forest, self._size = forest, size

    @classmethod
    def fit(cls, images: Images, labels: Int[np.ndarray, "_"]) -> "ClassJudge":
        """Learns from real pictures, some dozens or more of every class.

        Raises:
          InputError: fewer than two classes, another number of labels, or pictures of less than 8 x 8 pixels.
        """
        from sklearn.ensemble import (
            ExtraTreesClassifier,
        )  # here, since it would double the time that any run takes to start

        _check(images, labels)
        require(len(np.unique(labels)) > 1, "a classifier needs pictures of at least two classes")
        forest = ExtraTreesClassifier(_TREES, min_samples_leaf=_LEAF, random_state=0)
        forest.fit(np.concatenate([_features(images), _features(images, smooth=True)]), np.tile(labels, 2))
        return cls(forest, images.shape[1:])

    def classify(self, images: Images) -> Int[np.ndarray, "n"]:
        """The label of the most likely class of each picture. InputError for pictures of another size."""
        if images.shape[1:] != self._size:
            raise InputError(f"pictures of shape {list(images.shape[1:])}: the judge learned {list(self._size)}")
        return self._forest.predict(_features(images))

    def accuracy(self, images: Images, labels: Int[np.ndarray, "_"]) -> float:
        """The share of pictures, in [0, 1], that are assigned to their label.

        Of real pictures that it has not learned from, this is the judge's own accuracy; of samples, the share that is
        assigned to the class it was drawn for. InputError for no pictures, or another number of labels.
        """
        _check(images, labels)
        return float(np.mean(self.classify(images) == labels))


def _check(images: np.ndarray, labels: np.ndarray) -> None:
    if len(images) != len(labels) or not len(images):
        raise InputError(f"{len(images)} pictures with {len(labels)} labels: need as many labels as pictures, and some")
    if min(images.shape[1:3]) < _BLOCK:
        raise InputError(f"the classifier needs pictures of at least {_BLOCK} x {_BLOCK} pixels")


def _features(images: Images, *, smooth: bool = False) -> Float32[np.ndarray, "n f"]:
    parts = (images[start : start + _AT_ONCE] for start in range(0, len(images), _AT_ONCE))
    return np.concatenate([_of_part(part.astype(np.float32) / 255, smooth) for part in parts])


def _of_part(images: Float32[np.ndarray, "n H W 3"], smooth: bool) -> Float32[np.ndarray, "n f"]:
    if smooth:
        images = _smoothed(_smoothed(images, axis=1), axis=2)
    red, green, blue = np.moveaxis(images, -1, 0)
    # Brightness and two colour differences.
    channels = np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue], axis=-1)
    pixels = channels.reshape(len(images), -1, 3)
    quantiles = np.moveaxis(np.quantile(pixels, _LEVELS, axis=1), 0, 1).reshape(len(images), -1)
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    covariance = np.einsum("npi,npj->nij", centred, centred).reshape(len(images), -1) / pixels.shape[1]
    parts = (
        quantiles,
        np.sign(covariance) * np.sqrt(np.abs(covariance)),
        _colour_histogram(images),
        _power(channels),
        _edges(channels[..., 0]),
    )
    return np.concatenate(parts, axis=1).astype(np.float32)


def _smoothed(images: np.ndarray, axis: int) -> np.ndarray:
    """The weights 1/4, 1/2, 1/4 along an axis; the border is repeated."""
    length = images.shape[axis]
    before, after = (np.clip(np.arange(length) + step, 0, length - 1) for step in (-1, 1))
    return images / 2 + (np.take(images, before, axis) + np.take(images, after, axis)) / 4


def _colour_histogram(images: Float32[np.ndarray, "n H W 3"]) -> np.ndarray:
    """The square root of the share of each of 5 x 5 x 5 colours [n, 125]."""
    red, green, blue = np.moveaxis(np.minimum((images * _STEPS).astype(int), _STEPS - 1), -1, 0)
    return np.sqrt(_shares((red * _STEPS + green) * _STEPS + blue, np.ones_like(images[..., 0]), _STEPS**3))


def _power(channels: Float32[np.ndarray, "n H W 3"]) -> np.ndarray:
    """The logarithm of the mean power of the lowest frequencies in blocks [n, 27]."""
    rows, columns = (side // _BLOCK for side in channels.shape[1:3])
    blocks = channels[:, : rows * _BLOCK, : columns * _BLOCK]
    blocks = blocks.reshape(len(channels), rows, _BLOCK, columns, _BLOCK, 3)
    cosines = _cosines()
    waves = np.einsum("fy,nrycxk,gx->nrcfgk", cosines, blocks, cosines, optimize=True)
    return np.log(np.mean(np.square(waves), axis=(1, 2)) + _FLOOR).reshape(len(channels), -1)


def _edges(brightness: Float32[np.ndarray, "n H W"]) -> np.ndarray:
    """The square root of the mean strength of edges in each of eight directions [n, 8]."""
    down, right = np.gradient(brightness, axis=(1, 2))
    direction = np.arctan2(down, right) % np.pi / np.pi * _DIRECTIONS
    return np.sqrt(_shares(np.minimum(direction.astype(int), _DIRECTIONS - 1), np.hypot(down, right), _DIRECTIONS))


def _shares(bins: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """For each picture the mean over its pixels of the weights that fall into each bin [n, count]."""
    rows = zip(bins.reshape(len(bins), -1), weights.reshape(len(bins), -1), strict=True)
    return np.stack([np.bincount(row, weight, count) / row.size for row, weight in rows])


@functools.cache
def _cosines() -> np.ndarray:
    """The orthonormal cosine transform of 8 values, its lowest frequencies [3, 8]."""
    positions, frequencies = np.arange(_BLOCK) + 0.5, np.arange(_FREQUENCIES)
    waves = np.cos(np.pi / _BLOCK * frequencies[:, None] * positions[None]) * np.sqrt(2 / _BLOCK)
    waves[0] /= np.sqrt(2)
    return waves
