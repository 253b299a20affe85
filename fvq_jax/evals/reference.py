"""The statistics of the real pictures, kept in a folder: only the first evaluation on a data set collects them.

Statistics that others have collected come in the .npz files of ADM (guided-diffusion), see `read_statistics`.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL
from absl import logging

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.record import Source
from fvq_jax.models.frozen.inception import FEATURES, SPATIAL_FEATURES
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import reading, replace_whole

Moments = tuple[np.ndarray, np.ndarray]
_VERSION = 1  # of the preprocessing of pictures; increase it when that changes


@dataclasses.dataclass(frozen=True)
class Reference:
    """One file of statistics: mean [d] and covariance [d, d], float64, of the features of one set of pictures."""

    path: Path

    @classmethod
    def of(
        cls, folder: Path, source: Source, *, protocol: str, size: int, images: int, weights: str | os.PathLike[str]
    ) -> "Reference":
        """The file in `folder` for these pictures, cropped and scored in this way, and the network in `weights`."""
        with open(weights, "rb") as file:
            network = hashlib.file_digest(file, "sha256").hexdigest()
        what = {
            "pictures": pictures_hash(source),
            "protocol": protocol,
            "size": size,
            "images": images,
            "network": network,
            "version": _VERSION,
            "pillow": PIL.__version__,  # it decodes and resizes
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        return cls(folder / f"reference-{protocol}-{size}-{digest[:32]}.npz")

    def load(self) -> Moments | None:
        """Mean and covariance; None if they were never saved, or the file is damaged."""
        try:
            with open(self.path, "rb") as file, np.load(file) as arrays:
                return arrays["mean"], arrays["covariance"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            logging.warning("%s is damaged: its statistics are collected again", self.path)
            return None

    def save(self, moments: Moments) -> None:
        """Writes the file, which appears once it is whole. If it cannot be written, that is only a warning."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replace_whole(self.path) as unfinished, open(unfinished, "wb") as file:
                np.savez(file, mean=moments[0], covariance=moments[1])
        except OSError as error:
            logging.warning(
                "cannot write %s: %s; its statistics are collected again next time", self.path, error.strerror or error
            )


def read_statistics(path: str | os.PathLike[str]) -> tuple[Moments, Moments | None] | None:
    """Mean and covariance of the features of FID, and of sFID if they are there, from a reference file of ADM.

    `mu` [2048] and `sigma` [2048, 2048], `mu_s` [2023] and `sigma_s` [2023, 2023]. None if the file has no `mu`: then
    it holds pictures only (`arr_0`), from which its statistics are computed. The pictures themselves are not read.

    Raises:
      InputError: the file cannot be read, or its statistics have other shapes.
    """
    with reading(path):
        if not zipfile.is_zipfile(path) and os.path.exists(path):
            raise InputError(f"cannot read {path}: it is damaged, or no .npz file")
        with open(path, "rb") as file, np.load(file) as arrays:
            if "mu" not in arrays:
                return None
            pooled = _moments(arrays, "mu", "sigma", FEATURES[-1], path)
            spatial = _moments(arrays, "mu_s", "sigma_s", SPATIAL_FEATURES, path) if "mu_s" in arrays else None
            return pooled, spatial


def _moments(
    arrays: Mapping[str, np.ndarray], mean: str, covariance: str, size: int, path: str | os.PathLike[str]
) -> Moments:
    if covariance not in arrays:
        raise InputError(f"{path} has {mean} but no {covariance}")
    found = arrays[mean], arrays[covariance]
    if found[0].shape != (size,) or found[1].shape != (size, size):
        raise InputError(
            f"{path}: {mean} and {covariance} must be [{size}] and [{size}, {size}], not {list(found[0].shape)} and "
            f"{list(found[1].shape)}"
        )
    return found


def pictures_hash(source: Source) -> str:
    """A hash of the source. For a folder it covers names, sizes and times of change, to notice a replaced file."""
    digest = hashlib.sha256(f"{type(source).__name__} {source.fingerprint()}".encode())
    files = source.source if isinstance(source, RandomCrops) else source
    if isinstance(files, FolderSource):
        for index in range(len(files)):
            try:
                status = os.stat(files.name(index))
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:  # the evaluation skips and counts it
                digest.update(b"unreadable\n")
    return digest.hexdigest()
