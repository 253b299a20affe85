"""Folders of codes in ArrayRecord files as a source: the format of a record, and the source that reads it.

`extraction` writes them, and `shards` knows the files.
"""

import os
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Integer

from fvq_jax.data.code_record import CodeInfo, CodeRecord
from fvq_jax.data.shards import MANIFEST, Kind, OpenShards
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import reading

CODES = Kind(
    format="fvq_jax codes in ArrayRecord, version 1",
    what="folder of codes",
    doing="extracting",
    command="python -m fvq_jax.tokenize extract --out=",
    fields={
        "tokenizer": str,
        "vocab": int,
        "grid": list,
        "dtype": str,
        "classes": int,
        "class_names": list,
        "scales": list,
        "crops": int,
        "cropping": str,
        "condition": str,
        "size": int,
    },
)


def pack(codes: Integer[np.ndarray, "scales crops ..."], label: int, name: str) -> bytes:
    """A record: a MessagePack map of the codes' bytes, in the type they have, the class, and the picture's name."""
    record = {"name": name, "label": label, "codes": codes.astype(codes.dtype.newbyteorder("<"), "C").tobytes()}
    return msgpack.packb(record, unicode_errors="surrogateescape")


def smallest_type(vocab: int) -> np.dtype:
    """The smallest unsigned integer type that holds the codes 0 to `vocab` - 1, as it is stored: little-endian."""
    return np.min_scalar_type(max(0, vocab - 1)).newbyteorder("<")


class ExtractedCodes:
    """A folder written by `python -m fvq_jax.tokenize extract`: pictures in the order of the source they come from,
    without those that could not be read.

    Raises InputError if extracting did not finish, or a shard is missing or has another size than its manifest says.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self._shards = OpenShards(root, CODES)
        if not len(self._shards):
            raise InputError(f"folder of codes {str(root)!r} holds no picture")
        with reading(self._shards.root / MANIFEST):
            self._info, self._type = info_of(self._shards.plan), np.dtype(self._shards.plan["dtype"])

    @property
    def info(self) -> CodeInfo:
        """What the codes are, as the manifest says."""
        return self._info

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> CodeRecord:
        content = self._unpack(index)
        codes = np.frombuffer(content["codes"], self._type).reshape(self.info.shape)
        return {"codes": codes.astype(np.int32), "label": np.int32(content["label"])}

    def name(self, index: int) -> str:
        """Number of the record, and what the source of the pictures called the picture."""
        return f"{self._shards.root} record {index}: {self.relative_name(index)}"

    def relative_name(self, index: int) -> str:
        """What the source of the pictures called the picture: for a folder, its path below that folder."""
        return self._unpack(index)["name"]

    def fingerprint(self) -> str:
        """How many records, and a hash of the checksums of the shards."""
        return f"{len(self)} records, shards {self._shards.digest}"

    def _unpack(self, index: int) -> dict[str, Any]:
        try:
            return msgpack.unpackb(self._shards[index], unicode_errors="surrogateescape")
        except RuntimeError as error:  # the checksum that ArrayRecord keeps of the record does not match
            root, file = self._shards.root, self._shards.file(index)
            raise InputError(
                f"record {index} of {root} is damaged, in {file.name} ({str(error).splitlines()[0]}): remove that "
                f"file and {CODES.again(root)}"
            ) from error


def info_of(plan: dict[str, Any]) -> CodeInfo:
    """The facts that the manifest of a folder of codes holds."""
    names = plan["class_names"]
    return CodeInfo(
        tokenizer=plan["tokenizer"],
        vocab=plan["vocab"],
        grid=tuple(plan["grid"]),
        classes=plan["classes"],
        class_names=tuple(names),
        scales=tuple(plan["scales"]),
        crops=plan["crops"],
        cropping=plan["cropping"],
        condition=plan["condition"],
        size=plan["size"],
    )
