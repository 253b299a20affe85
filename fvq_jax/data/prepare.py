"""Command line: a folder of pictures to ArrayRecord files, which `data.source=array_record` reads.

  python -m fvq_jax.data.prepare FOLDER OUT [--workers=N] [--shard-size=N] [--check] [--verify]

It may be killed at any moment, and goes on where it was when it is started again: a shard gets its name, and a line in
the journal, once it is whole; the manifest is written last. Shards written before must have the size that was noted,
and with `--verify` the checksum too. Exit codes: 0 done, 2 bad input, 75 interrupted (start it again), 1 anything else.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from fvq_jax.data.array_record import FORMAT, MANIFEST, WRITER_OPTIONS, Manifest, Shard, pack
from fvq_jax.data.decode import UnreadableImageError, decode_image
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.worker import follow_parent
from fvq_jax.runtime import exits
from fvq_jax.runtime.arguments import Parser
from fvq_jax.runtime.errors import InputError, RunError
from fvq_jax.runtime.files import UNFINISHED, replace_whole
from fvq_jax.runtime.interrupt import Interrupt

JOURNAL = "unfinished.jsonl"
_POLL_SECONDS = 0.2


def main(argv: list[str] | None = None) -> int:
    """Prepares a folder; returns the exit code."""
    args = _parse(argv)
    return exits.run(lambda: _prepare(args))


def _prepare(args: argparse.Namespace) -> int:
    try:
        with Interrupt() as interrupt:
            message = prepare(args, interrupt)
    except BrokenProcessPool:
        raise RunError(
            "a worker process died, perhaps for lack of memory; start me again, with fewer --workers"
        ) from None
    if interrupt.signal and not message:
        return exits.fail(f"interrupted by {interrupt.signal.name}: start me again", exits.INTERRUPTED)
    sys.stdout.write(f"{message}\n")
    return 0


def prepare(args: argparse.Namespace, interrupt: Interrupt) -> str:
    """Writes what is missing in `args.out`; returns a line about what is there now, an empty one if interrupted."""
    if args.workers < 1 or args.shard_size < 1:
        raise InputError(f"--workers and --shard-size must be above 0, not {args.workers} and {args.shard_size}")
    source = FolderSource(args.folder)
    plan = {
        "format": FORMAT,
        "pictures": source.fingerprint(),
        "shard_size": args.shard_size,
        "checked": args.check,
        "classes": source.classes,
    }
    with _Journal(args.out, plan) as journal:
        starts = range(0, len(source), args.shard_size)
        ranges = {
            f"pictures-{number:05d}-of-{len(starts):05d}.array_record": range(
                start, min(start + args.shard_size, len(source))
            )
            for number, start in enumerate(starts)
        }
        for name, shard in list(journal.shards.items()):
            if wrong := shard.check(args.out) or (args.verify and _wrong_checksum(args.out, shard)):
                journal.forget(name)
                _warn(f"{wrong}: it is written again")
        missing = {name: indices for name, indices in ranges.items() if name not in journal.shards}
        if missing and (interrupt.signal or not _write_shards(source, args, missing, journal, interrupt)):
            return ""
        shards = tuple(journal.shards[name] for name in ranges)
        if not any(shard.records for shard in shards):
            raise InputError(f"none of the {len(source)} files in {args.folder} is a readable picture")
        if missing or not (args.out / MANIFEST).exists():
            Manifest(plan, shards).write(args.out)
        journal.finish()
    return (
        f"{args.out}: {sum(shard.records for shard in shards):,} pictures of {len(source.classes):,} classes in "
        f"{len(shards):,} shards, {sum(shard.bytes for shard in shards) / 1e9:,.2f} GB, "
        f"{sum(len(shard.left_out) for shard in shards):,} left out, {len(missing):,} shards written now"
        f"{', the others as their checksums say' if args.verify else ''}"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="fvq_jax.data.prepare", description="A folder of pictures to ArrayRecord files.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of JPEG, PNG or WebP files")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder, or one begun before")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--shard-size", type=int, default=4096, help="pictures in one file (default: 4096)")
    parser.add_argument("--check", action="store_true", help="decode every picture, and leave out what is unreadable")
    parser.add_argument("--verify", action="store_true", help="compare shards that are there with their checksums")
    return parser.parse_args(argv)


class _Journal:
    """Which shards of an output folder are whole, and what they are made from. While it is open the folder is locked.

    The first line of the file is the plan, and each further line a shard; of several lines for one shard the last
    counts. Lines are only ever appended, so a kill can damage only the last one. The file is removed once the manifest
    is written.
    """

    def __init__(self, out: Path, plan: dict[str, Any]):
        self.shards: dict[str, Shard] = {}
        self._out, self._plan = out, plan

    def __enter__(self) -> "_Journal":
        path = self._out / JOURNAL
        with contextlib.ExitStack() as stack:
            try:
                self._out.mkdir(parents=True, exist_ok=True)
                if not path.exists() and not (self._out / MANIFEST).exists() and any(self._out.iterdir()):
                    raise InputError(f"{self._out} holds something else: give a new or empty folder")
                self._file = stack.enter_context(open(path, "ab+", buffering=0))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is preparing {self._out}") from None
            except OSError as error:
                raise InputError(f"cannot write to {self._out}: {error.strerror}") from error
            self._read()
            stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, shard: Shard) -> None:
        """Notes a shard that has just got its name."""
        self.shards[shard.file] = shard
        self._append(dataclasses.asdict(shard))

    def forget(self, name: str) -> None:
        """Removes a damaged shard, and the manifest that names it."""
        (self._out / MANIFEST).unlink(missing_ok=True)
        (self._out / name).unlink(missing_ok=True)
        del self.shards[name]

    def finish(self) -> None:
        """Removes the file, once the manifest holds what it says."""
        (self._out / JOURNAL).unlink(missing_ok=True)

    def _read(self) -> None:
        """Reads journal or manifest, and clears away what a kill has left."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = [json.loads(line) for line in whole.splitlines()]
        if (self._out / MANIFEST).exists():
            manifest = Manifest.read(self._out)
            plan, shards = manifest.plan, list(manifest.shards)
        elif lines:
            plan, shards = lines[0], [Shard(**{**line, "left_out": tuple(line["left_out"])}) for line in lines[1:]]
        else:
            plan, shards = self._plan, []
        if plan != self._plan:
            if not lines:
                self.finish()
            self._refuse(plan)
        if not lines:
            self._append(plan)
            for shard in shards:
                self._append(dataclasses.asdict(shard))
        self.shards = {shard.file: shard for shard in shards}
        for path in self._out.glob(f"*{UNFINISHED}"):
            path.unlink(missing_ok=True)

    def _append(self, line: dict[str, Any]) -> None:
        rest = json.dumps(line).encode() + b"\n"
        try:
            while rest:  # a disk that becomes full takes only the first part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self._out / JOURNAL}: {error.strerror}") from error

    def _refuse(self, plan: dict[str, Any]) -> None:
        for field, option in (("shard_size", "--shard-size"), ("checked", "--check")):
            if plan.get(field) != self._plan[field]:
                raise InputError(
                    f"{self._out} was begun with {option} {plan.get(field)}, not {self._plan[field]}: "
                    "give the same, or another OUT"
                )
        raise InputError(
            f"the pictures are not those {self._out} was begun with ({plan.get('pictures')} -> "
            f"{self._plan['pictures']}): put the same files there, or give another OUT"
        )


def _write_shards(
    source: FolderSource,
    args: argparse.Namespace,
    missing: dict[str, range],
    journal: _Journal,
    interrupt: Interrupt,
) -> bool:
    """Writes these shards in worker processes; False if it was interrupted before the last one."""
    context = multiprocessing.get_context("spawn")
    stop, done = context.Event(), context.Value("q")
    total = len(source)
    bar = tqdm(total=total, initial=total - sum(map(len, missing.values())), unit=" pictures", desc="preparing")
    before = bar.n
    pool = ProcessPoolExecutor(
        min(args.workers, len(missing)), context, _start_worker, (source, args.out, args.check, stop, done)
    )
    with contextlib.closing(bar):
        try:
            pending = {pool.submit(_write_shard, name, indices) for name, indices in missing.items()}
            while pending and interrupt.signal is None:
                finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    shard = future.result()
                    for name in shard.left_out:
                        _warn(f"left out {name!r}: not a readable picture")
                    journal.add(shard)
                if new := before + done.value - bar.n:
                    bar.update(new)
            return not pending
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Worker:
    """What all tasks of a worker process share."""

    source: FolderSource
    out: Path
    check: bool
    stop: Any
    done: Any


class _StoppedError(Exception):
    """Leaves a shard unfinished, since the main process waits for no more of them."""


_worker: _Worker  # set by `_start_worker`


def _start_worker(*shared: Any) -> None:
    global _worker
    follow_parent()
    _worker = _Worker(*shared)


def _write_shard(name: str, indices: range) -> Shard:
    """Writes one file under a temporary name, reads it back, then gives it `name`. Runs in a worker process."""
    path = _worker.out / name
    left_out = []
    try:
        with replace_whole(path) as unfinished:
            writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
            for index in indices:
                if _worker.stop.is_set():
                    raise _StoppedError
                picture = _worker.source.relative_name(index)
                image = _read_picture(index)
                if image is None:
                    left_out.append(picture)
                else:
                    writer.write(pack(image, _worker.source.label(index), picture))
                with _worker.done.get_lock():
                    _worker.done.value += 1
            writer.close()
            records = len(indices) - len(left_out)
            _check_count(unfinished, records)
            with open(unfinished, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            size = unfinished.stat().st_size
    except (OSError, RuntimeError) as error:  # the latter from ArrayRecord
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    return Shard(name, records, size, digest, tuple(left_out))


def _read_picture(index: int) -> bytes | None:
    """The bytes of a file; None if it is to be left out."""
    path = _worker.source.name(index)
    try:
        image = Path(path).read_bytes()
        if _worker.check:
            decode_image(image)
        return image
    except UnreadableImageError:
        return None
    except OSError as error:
        if _worker.check:
            return None
        raise InputError(f"cannot read {path}: {error.strerror}; --check leaves out such files") from error


def _check_count(path: Path, records: int) -> None:
    reader = ArrayRecordReader(str(path))
    try:
        if reader.num_records() != records:
            raise OSError(f"{reader.num_records()} of {records} records arrived")
    finally:
        reader.close()


def _wrong_checksum(folder: Path, shard: Shard) -> str:
    with open(folder / shard.file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == shard.sha256 else f"{folder / shard.file} has another checksum than when it was written"


def _warn(message: str) -> None:
    tqdm.write(f"fvq_jax: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
