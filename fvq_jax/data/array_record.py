"""Folders of pictures in ArrayRecord files as a source: the format of a record, and the source that reads it.

`prepare` writes them, and `shards` knows the files.
"""

import os
from collections.abc import Collection

import msgpack
import numpy as np

from fvq_jax.data.decode import UnreadableImageError
from fvq_jax.data.record import Record
from fvq_jax.data.shards import Kind, OpenShards
from fvq_jax.runtime.errors import InputError

PICTURES = Kind(
    format="fvq_jax pictures in ArrayRecord, version 1",
    what="prepared folder",
    doing="preparing",
    command="python -m fvq_jax.data.prepare FOLDER ",
    fields={"classes": list},
)


def pack(image: bytes, label: int, name: str) -> bytes:
    """A record: a MessagePack map of the picture file's own bytes, its class and its path below the folder."""
    record = {"name": name, "label": label, "image": image}
    return msgpack.packb(record, unicode_errors="surrogateescape")


def unpack(record: bytes) -> tuple[bytes, int, str]:
    """Picture, label and name, see `pack`."""
    content = msgpack.unpackb(record, unicode_errors="surrogateescape")
    return content["image"], content["label"], content["name"]


class ArrayRecordSource:
    """A folder written by `python -m fvq_jax.data.prepare`. It has the pictures, labels and order of the folder that it
    was made from, without the pictures that were left out as unreadable.

    Raises InputError if preparing did not finish, or a shard is missing or has another size than its manifest says.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self._shards = OpenShards(root, PICTURES)
        self.classes: list[str] = self._shards.plan["classes"]
        if not len(self._shards):
            raise InputError(f"prepared folder {str(root)!r} holds no picture")

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Record:
        image, label, _ = self._unpack(index)
        return {"image": image, "label": np.int32(label)}

    def name(self, index: int) -> str:
        """Number of the record, and the picture's path below the folder it was prepared from."""
        try:
            name = self.relative_name(index)
        except UnreadableImageError as error:
            name = str(error)
        return f"{self._shards.root} record {index}: {name}"

    def relative_name(self, index: int) -> str:
        """The picture's path below the folder it was prepared from. UnreadableImageError if the record is damaged."""
        return self._unpack(index)[2]

    def fingerprint(self) -> str:
        """How many records, and a hash of the checksums of the shards."""
        return f"{len(self)} records, shards {self._shards.digest}"

    def fingerprint_without(self, left_out: Collection[str]) -> str:
        """The fingerprint of the folder that the pictures come from: of what it holds, only the unreadable may miss."""
        return f"prepared from {self._shards.plan['pictures']}"

    def _unpack(self, index: int) -> tuple[bytes, int, str]:
        try:
            return unpack(self._shards[index])
        except RuntimeError as error:  # the checksum that ArrayRecord keeps of the record does not match
            raise UnreadableImageError(f"damaged record ({error})") from error
