"""Folders of ArrayRecord files: their manifest, writing a file so that a kill loses nothing, and opening them all.

`array_record` keeps pictures in them, and `codes` keeps codes. What a record looks like is left to those modules.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole

MANIFEST = "manifest.json"
# One record per group, for random access. Pictures are compressed already, and codes are nearly random.
WRITER_OPTIONS = "group_size:1,uncompressed"
_SPARE_FILES, _MANY_FILES = 256, 65536


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the folders of one program hold, and how messages speak about them.

    Attributes:
      format: name and version of the format, which the manifest repeats.
      what: what to call such a folder, for instance "prepared folder".
      doing: what the program does, for instance "preparing".
      command: the program that writes the folder; the name of the folder follows.
      fields: what the plan in its manifest holds besides the format, with the types.
    """

    format: str
    what: str
    doing: str
    command: str
    fields: Mapping[str, type]

    def again(self, folder: Path) -> str:
        """How to write the folder, or what is missing in it."""
        return f"run {self.command}{folder} again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file. `left_out` names the pictures that belong in this file but could not be read."""

    file: str
    records: int
    bytes: int
    sha256: str
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Shard":
        """The shard that a line of a journal or an entry of a manifest describes. TypeError or KeyError if none."""
        return cls(**{**fields, "left_out": tuple(fields["left_out"])})

    def check(self, folder: Path) -> str:
        """What is wrong with the file, judged by its size alone; empty if nothing is."""
        path = folder / self.file
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}"
        return "" if size == self.bytes else f"{path} has {size} bytes and not {self.bytes}"

    def check_content(self, folder: Path) -> str:
        """What is wrong with the file, whose whole content is read; empty if nothing is."""
        if wrong := self.check(folder):
            return wrong
        with open(folder / self.file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == self.sha256:
            return ""
        return f"{folder / self.file} has another checksum than when it was written"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. `plan` says from what it was made, and how. The file is written last."""

    plan: dict[str, Any]
    shards: tuple[Shard, ...]

    @classmethod
    def read(cls, folder: Path, kind: Kind) -> "Manifest":
        """The manifest of a folder of this kind. InputError if it cannot be read, or is no manifest."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
            records, shards = content.pop("records"), content.pop("shards")
            manifest = cls(content, tuple(map(Shard.of, shards)))
            there = all(isinstance(content.get(name), type_) for name, type_ in kind.fields.items())
            counted = records == sum(shard.records for shard in manifest.shards)
            whole = content["format"] != kind.format or (there and counted)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise InputError(f"{path} is damaged: delete it and {kind.again(folder)}")
        if content["format"] != kind.format:
            raise InputError(f"{path} says {content['format']!r}, not {kind.format!r}: {kind.again(folder)}")
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


class OpenShards:
    """The records of a whole folder, by number; small when pickled. `digest` changes with them, not with their place.

    Raises InputError if writing the folder did not finish, or a shard is missing or has another size than its manifest
    says.
    """

    def __init__(self, root: str | os.PathLike[str], kind: Kind):
        self.root = Path(root).absolute()
        if not self.root.is_dir():
            raise InputError(f"{kind.what} {str(root)!r} does not exist or is not a folder")
        if not (self.root / MANIFEST).exists():
            raise InputError(
                f"{self.root} has no {MANIFEST}, which is written last: {kind.doing} did not finish, "
                f"{kind.again(self.root)}"
            )
        manifest = Manifest.read(self.root, kind)
        for shard in manifest.shards:
            if wrong := shard.check(self.root):
                raise InputError(f"{wrong}: {kind.again(self.root)}")
        self.plan = manifest.plan
        self._shards = [(shard.file, shard.records) for shard in manifest.shards if shard.records]
        checksums = "".join(shard.sha256 for shard in manifest.shards if shard.records)
        self.digest = hashlib.sha256(checksums.encode()).hexdigest()[:16]
        if self._shards:
            allow_open_files(len(self._shards))
            # The number of records is given, so that no file is opened before it is needed.
            self._records = ArrayRecordDataSource([f"{self.root / file}[0:{count}]" for file, count in self._shards])

    def __len__(self) -> int:
        return sum(records for _, records in self._shards)

    def __getitem__(self, index: int) -> bytes:
        """Record `index`. RuntimeError if the checksum that ArrayRecord keeps of it does not match."""
        return self._records[index]

    def file(self, index: int) -> Path:
        """The shard that holds record `index`."""
        for file, records in self._shards:
            if index < records:
                return self.root / file
            index -= records
        raise IndexError(index)


class ShardWriter:
    """Writes one shard: a context manager that gives the file its name once it is whole and has been read back.

    An exception inside leaves no file. InputError if the file cannot be written.

    Attributes:
      shard: what was written, after the block.
    """

    shard: Shard

    def __init__(self, path: Path):
        self._path, self._records, self._left_out = path, 0, list[str]()

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack, _writing(self._path):
            self._unfinished = stack.enter_context(replace_whole(self._path))
            self._writer = ArrayRecordWriter(str(self._unfinished), WRITER_OPTIONS)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._stack.__exit__(*exception)
            return
        with _writing(self._path), self._stack:
            self._writer.close()
            _check_count(self._unfinished, self._records)
            with open(self._unfinished, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            size = self._unfinished.stat().st_size
        self.shard = Shard(self._path.name, self._records, size, digest, tuple(self._left_out))

    def write(self, record: bytes) -> None:
        """Adds a record."""
        with _writing(self._path):
            self._writer.write(record)
        self._records += 1

    def leave_out(self, name: str) -> None:
        """Notes a picture that belongs here but could not be read."""
        self._left_out.append(name)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter from ArrayRecord
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _check_count(path: Path, records: int) -> None:
    reader = ArrayRecordReader(str(path))
    try:
        if reader.num_records() != records:
            raise OSError(f"{reader.num_records()} of {records} records arrived")
    finally:
        reader.close()


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
