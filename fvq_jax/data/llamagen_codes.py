"""The files of codes that LlamaGen's program writes, one per picture, as a source."""

import hashlib
import math
import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from fvq_jax.data.code_record import CodeInfo, CodeRecord
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.files import reading

_FOLDER, _FILE = re.compile(r"imagenet(\d+)_codes"), re.compile(r"(\d+)\.npy")
_SECOND_SCALE = "_105"  # the end of the name of a folder beside it, with the same pictures at a second scale
_SCALES = (1.1, 1.05)
_TEN = 10


def find_codes(root: str | os.PathLike[str]) -> str:
    """The name of the folder of codes in `root`, `imagenet256_codes` for instance; empty if there is none."""
    try:
        names = sorted(entry.name for entry in os.scandir(root) if _FOLDER.fullmatch(entry.name))
    except OSError:
        return ""
    if len(names) > 1:
        raise InputError(f"{root} holds codes of several sizes: {', '.join(names)}; give a folder with one of them")
    return names[0] if names else ""


class LlamaGenCodes:
    """A folder ROOT with ROOT/imagenet{S}_codes/{i}.npy, whole numbers [1, crops, t], and
    ROOT/imagenet{S}_labels/{i}.npy, one whole number; i runs from 0 without a gap.

    With ten crops ROOT_105, if there is one, holds the same pictures at a second scale, as in LlamaGen's training.
    With two, the second is the mirrored first. The grid is square. The files tell neither the tokenizer, nor what its
    bridge was given if that has classes, nor how many codes and classes there are.

    Raises InputError if files are missing, or the first does not have such a shape.
    """

    def __init__(self, root: str | os.PathLike[str]):
        first = Path(os.path.abspath(root))
        self._folder = find_codes(first)
        require(bool(self._folder), f"{root} holds no folder imagenet*_codes")
        self._roots = [first]
        self._length = _count(first, self._folder)
        codes = self._codes(0, 0)
        crops, length = codes.shape
        second = first.with_name(first.name + _SECOND_SCALE)
        if crops == _TEN and find_codes(second) == self._folder:
            self._roots.append(second)
            count = _count(second, self._folder)
            require(
                count == self._length, f"{second} holds the codes of {count} pictures, and {first} of {self._length}"
            )
        side = math.isqrt(length)
        require(side * side == length, f"{first / self._folder}: {length} codes of a crop make no square grid")
        self._info = CodeInfo(
            tokenizer="",
            vocab=0,
            grid=(side, side),
            classes=0,
            class_names=(),
            scales=_SCALES[: len(self._roots)] if crops == _TEN else (1.0,),
            crops=crops,
            cropping="ten" if crops == _TEN else "center",
            condition="",
            size=int(_digits(self._folder)),
        )

    @property
    def info(self) -> CodeInfo:
        """What the codes are, as far as the files tell."""
        return self._info

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> CodeRecord:
        if not 0 <= index < self._length:
            raise IndexError(index)
        scales = [self._codes(scale, index) for scale in range(len(self._roots))]
        for root, codes in zip(self._roots, scales, strict=True):
            wanted = self._info.shape[1], self._info.length
            require(
                codes.shape == wanted,
                f"{root / self._folder / f'{index}.npy'} holds codes {list(codes.shape)}, and the first file "
                f"{list(wanted)}",
            )
        path = self._roots[0] / _labels(self._folder) / f"{index}.npy"
        label = _load(path)
        require(label.size == 1, f"{path} holds {label.size} labels and not one")
        return {
            "codes": np.stack(scales).reshape(self._info.shape).astype(np.int32),
            "label": np.int32(label.reshape(())),
        }

    def name(self, index: int) -> str:
        """The file of the codes."""
        return str(self._roots[0] / self._folder / f"{index}.npy")

    def fingerprint(self) -> str:
        """How many pictures and scales, and a hash of the first, the middle and the last of them.

        It does not read all: there are as many files as pictures.
        """
        digest = hashlib.sha256()
        for index in sorted({0, self._length // 2, self._length - 1}):
            record = self[index]
            digest.update(record["codes"].tobytes() + record["label"].tobytes())
        return f"{self._length} pictures, {len(self._roots)} scales, codes {digest.hexdigest()[:16]}"

    def _codes(self, scale: int, index: int) -> Integer[np.ndarray, "crops t"]:
        path = self._roots[scale] / self._folder / f"{index}.npy"
        codes = _load(path)
        require(
            codes.ndim == 3 and codes.shape[0] == 1 and codes.size > 0,
            f"{path} holds {list(codes.shape)}, and codes are [1, crops, t]",
        )
        return codes[0]


def _load(path: Path) -> np.ndarray:
    with reading(path):
        values = np.load(path)
    require(isinstance(values, np.ndarray) and values.dtype.kind in "iu", f"{path} holds no whole numbers")
    return values


def _count(root: Path, folder: str) -> int:
    """How many pictures there are. InputError unless their files are 0.npy, 1.npy, ... for codes and labels alike."""
    counts = []
    for name in (folder, _labels(folder)):
        count, largest = 0, -1
        try:
            for entry in os.scandir(root / name):
                if found := _FILE.fullmatch(entry.name):
                    count, largest = count + 1, max(largest, int(found[1]))
        except OSError as error:
            raise InputError(f"cannot read {root / name}: {error.strerror}") from error
        require(
            0 < count == largest + 1,
            f"{root / name} must hold 0.npy, 1.npy and so on without a gap, and does not: copy or write all of them",
        )
        counts.append(count)
    require(counts[0] == counts[1], f"{root} holds {counts[0]} files of codes and {counts[1]} of labels")
    return counts[0]


def _labels(folder: str) -> str:
    return folder.removesuffix("codes") + "labels"


def _digits(folder: str) -> str:
    return "".join(filter(str.isdigit, folder))
