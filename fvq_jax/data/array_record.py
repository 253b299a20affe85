"""Folders of ArrayRecord files as a source: the record format, the manifest, and the source that reads both.

`prepare` writes them.
"""

import dataclasses
import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from fvq_jax.data.decode import UnreadableImageError
from fvq_jax.data.record import Record
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole

FORMAT = "fvq_jax pictures in ArrayRecord, version 1"
MANIFEST = "manifest.json"
# One record per group, for random access. Picture files are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"
_SPARE_FILES, _MANY_FILES = 256, 65536


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file. `left_out` names the pictures that belong in this file but could not be read."""

    file: str
    records: int
    bytes: int
    sha256: str
    left_out: tuple[str, ...] = ()

    def check(self, folder: Path) -> str:
        """What is wrong with the file, judged by its size alone; empty if nothing is."""
        path = folder / self.file
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}"
        return "" if size == self.bytes else f"{path} has {size} bytes and not {self.bytes}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. `plan` says from which pictures it was made, and how. The file is written last."""

    plan: dict[str, Any]
    shards: tuple[Shard, ...]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a prepared folder. InputError if it cannot be read, or is no manifest."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
            records, shards = content.pop("records"), content.pop("shards")
            manifest = cls(content, tuple(Shard(**{**shard, "left_out": tuple(shard["left_out"])}) for shard in shards))
            whole = content["format"] != FORMAT or records == sum(shard.records for shard in manifest.shards)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise InputError(f"{path} is damaged: delete it and run python -m fvq_jax.data.prepare again")
        if content["format"] != FORMAT:
            raise InputError(f"{path} says {content['format']!r}, not {FORMAT!r}: prepare the pictures again")
        return manifest

    def write(self, folder: Path) -> None:
        """Writes the file, which appears once it is whole. InputError if it cannot be written."""
        content = {
            **self.plan,
            "records": sum(shard.records for shard in self.shards),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        try:
            with replace_whole(folder / MANIFEST) as unfinished, open(unfinished, "w") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {folder / MANIFEST}: {error.strerror}") from error


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
        self._root = Path(root).absolute()
        if not self._root.is_dir():
            raise InputError(f"prepared folder {str(root)!r} does not exist or is not a folder")
        if not (self._root / MANIFEST).exists():
            raise InputError(
                f"{self._root} has no {MANIFEST}, which is written last: preparing did not finish, run "
                f"python -m fvq_jax.data.prepare FOLDER {self._root} again"
            )
        manifest = Manifest.read(self._root)
        for shard in manifest.shards:
            if wrong := shard.check(self._root):
                raise InputError(f"{wrong}: run python -m fvq_jax.data.prepare FOLDER {self._root} again")
        self.classes: list[str] = manifest.plan["classes"]
        shards = [shard for shard in manifest.shards if shard.records]
        if not shards:
            raise InputError(f"prepared folder {str(root)!r} holds no picture")
        allow_open_files(len(shards))
        # The number of records is given, so that no file is opened before it is needed.
        self._records = ArrayRecordDataSource([f"{self._root / shard.file}[0:{shard.records}]" for shard in shards])
        self._digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        image, label, _ = self._unpack(index)
        return {"image": image, "label": np.int32(label)}

    def name(self, index: int) -> str:
        """Number of the record, and the picture's path below the folder it was prepared from."""
        try:
            name = self._unpack(index)[2]
        except UnreadableImageError as error:
            name = str(error)
        return f"{self._root} record {index}: {name}"

    def fingerprint(self) -> str:
        """How many records, and a hash of the checksums of the shards."""
        return f"{len(self)} records, shards {self._digest}"

    def _unpack(self, index: int) -> tuple[bytes, int, str]:
        try:
            return unpack(self._records[index])
        except RuntimeError as error:  # the checksum that ArrayRecord keeps of the record does not match
            raise UnreadableImageError(f"damaged record ({error})") from error


def allow_open_files(count: int) -> None:
    """Lets this process, and those it starts, hold `count` more files open than they have open now.

    A shard stays open once it has been read from, and many systems allow 1,024 open files unless a process asks for
    more. InputError if the system does not allow enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < count + _SPARE_FILES:
        if hard != unlimited and hard < count + _SPARE_FILES:
            raise InputError(f"{count} shards are read at once, but only {hard} files may be open: see ulimit -Hn")
        # As many as the system allows, since other sources need open files too.
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, _MANY_FILES) if hard == unlimited else hard, hard))
