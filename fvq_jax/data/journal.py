"""Which shards of a folder that is being written are whole: what lets a program go on after it was killed."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from fvq_jax.data.shards import MANIFEST, Kind, Manifest, Shard
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import UNFINISHED

JOURNAL = "unfinished.jsonl"
_OTHERS = "unfinished-*.jsonl"  # of the other processes, if there are several


class Journal:
    """The whole shards of an output folder, and what they are made from. While it is open the folder is locked.

    The first line of the file is the plan, and each further line a shard; of several lines for one shard the last
    counts. Lines are only ever appended, so a kill can damage only the last one. The file is removed once the manifest
    is written. Every process of a run has a file of its own: the first opens its journal before the others do, and
    takes over what the others of an earlier run have noted.

    Attributes:
      shards: the shards that are whole, by name; in the other processes those that they have added themselves.
    """

    def __init__(
        self,
        out: Path,
        plan: Mapping[str, Any],
        kind: Kind,
        options: Mapping[str, str],
        *,
        notes: Collection[str] = (),
        process: int = 0,
    ):
        """`options` says, for a field of the plan, what to call it when another value is refused.

        The field `pictures` of the plan is the fingerprint of the source. The fields `notes` may be others than those
        that the folder was begun with.
        """
        self.shards: dict[str, Shard] = {}
        self._out, self._plan, self._kind, self._options, self._notes = out, dict(plan), kind, options, notes
        self._first = process == 0
        self._path = out / (JOURNAL if self._first else _OTHERS.replace("*", f"{process:05d}"))

    def __enter__(self) -> "Journal":
        with contextlib.ExitStack() as stack:
            try:
                self._out.mkdir(parents=True, exist_ok=True)
                new = not self._path.exists() and not (self._out / MANIFEST).exists()
                if self._first and new and any(self._out.iterdir()):
                    raise InputError(f"{self._out} holds something else: give a new or empty folder")
                self._file = stack.enter_context(self._locked(self._path))
            except OSError as error:
                raise InputError(f"cannot write to {self._out}: {error.strerror}") from error
            if self._first:
                self._read()
            else:
                self._file.truncate(0)
            stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, shard: Shard) -> None:
        """Notes a shard that has just got its name."""
        self.shards[shard.file] = shard
        self._append(dataclasses.asdict(shard))

    def drop_damaged(self, *, verify: bool) -> list[str]:
        """Removes shards that are damaged, and the manifest that names them; says what is wrong with each.

        They are judged by their size, or with `verify` by their whole content.
        """
        damaged = []
        for name, shard in list(self.shards.items()):
            if wrong := shard.check_content(self._out) if verify else shard.check(self._out):
                (self._out / MANIFEST).unlink(missing_ok=True)
                (self._out / name).unlink(missing_ok=True)
                del self.shards[name]
                damaged.append(wrong)
        return damaged

    def finish(self) -> None:
        """Removes the files of all processes, once the manifest holds what they say."""
        for path in (*self._out.glob(_OTHERS), self._path):
            path.unlink(missing_ok=True)

    def _locked(self, path: Path) -> IO[bytes]:
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by whoever asks for it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"another process is {self._kind.doing} {self._out}") from None
        except OSError:
            file.close()
            raise
        return file

    def _read(self) -> None:
        """Reads journal or manifest, and clears away what a kill has left."""
        lines = _whole_lines(self._file)
        if (self._out / MANIFEST).exists():
            manifest = Manifest.read(self._out, self._kind)
            plan, shards = manifest.plan, list(manifest.shards)
        elif lines:
            plan, shards = lines[0], list(map(Shard.of, lines[1:]))
        else:
            plan, shards = self._plan, []
        if self._compared(plan) != self._compared(self._plan):
            if not lines:
                self._path.unlink(missing_ok=True)
            self._refuse(plan)
        if not lines:
            self._append(plan)
            for shard in shards:
                self._append(dataclasses.asdict(shard))
        self.shards = {shard.file: shard for shard in shards}
        for path in sorted(self._out.glob(_OTHERS)):
            with self._locked(path) as file:
                for line in _whole_lines(file):
                    self.add(Shard.of(line))
                path.unlink()
        for path in self._out.glob(f"*{UNFINISHED}"):
            path.unlink(missing_ok=True)

    def _append(self, line: Mapping[str, Any]) -> None:
        rest = json.dumps(line).encode() + b"\n"
        try:
            while rest:  # a disk that becomes full takes only the first part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from error

    def _compared(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in plan.items() if field not in self._notes}

    def _refuse(self, plan: Mapping[str, Any]) -> None:
        for field, option in self._options.items():
            if plan.get(field) != self._plan[field]:
                raise InputError(
                    f"{self._out} was begun with {option} {plan.get(field)}, not {self._plan[field]}: "
                    "give the same, or another OUT"
                )
        raise InputError(
            f"the pictures are not those {self._out} was begun with ({plan.get('pictures')} -> "
            f"{self._plan['pictures']}): put the same files there, or give another OUT"
        )


def _whole_lines(file: IO[bytes]) -> list[dict[str, Any]]:
    """The lines of a journal, without half a line at its end, which is cut off."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
