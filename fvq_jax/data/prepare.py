"""Command line: a folder of pictures to ArrayRecord files, which `data.source=array_record` reads.

  python -m fvq_jax.data.prepare FOLDER OUT [--workers=N] [--shard-size=N] [--check] [--verify]

It may be killed at any moment, and goes on where it was when it is started again: a shard gets its name, and a line in
the journal, once it is whole; the manifest is written last. Shards written before must have the size that was noted,
and with `--verify` the checksum too. Exit codes: 0 done, 2 bad input, 75 interrupted (start it again), 1 anything else.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fvq_jax.data.array_record import PICTURES, pack
from fvq_jax.data.decode import decode_image
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.journal import Journal
from fvq_jax.data.shards import MANIFEST, Manifest, Shard, ShardWriter
from fvq_jax.data.unreadable import UNREADABLE, said
from fvq_jax.data.worker import follow_parent
from fvq_jax.runtime import exits
from fvq_jax.runtime.arguments import Parser, some_path
from fvq_jax.runtime.errors import InputError, RunError
from fvq_jax.runtime.interrupt import Interrupt

_POLL_SECONDS = 0.2


def main(argv: list[str] | None = None) -> int:
    """Prepares a folder; returns the exit code."""
    args = _parse(argv)
    return exits.run(lambda: _prepare(args), kept="whole shards are kept, start me again", resumes=True)


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
        "format": PICTURES.format,
        "pictures": source.fingerprint(),
        "shard_size": args.shard_size,
        "checked": args.check,
        "classes": source.classes,
    }
    options = {"shard_size": "--shard-size", "checked": "--check"}
    with Journal(args.out, plan, PICTURES, options) as journal:
        starts = range(0, len(source), args.shard_size)
        ranges = {
            f"pictures-{number:05d}-of-{len(starts):05d}.array_record": range(
                start, min(start + args.shard_size, len(source))
            )
            for number, start in enumerate(starts)
        }
        for wrong in journal.drop_damaged(verify=args.verify):
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
    parser.add_argument("folder", metavar="FOLDER", type=some_path, help="folder of JPEG, PNG, WebP, BMP or GIF files")
    parser.add_argument("out", metavar="OUT", type=some_path, help="new folder, or one begun before")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--shard-size", type=int, default=4096, help="pictures in one file (default: 4096)")
    parser.add_argument("--check", action="store_true", help="decode every picture, and leave out what is unreadable")
    parser.add_argument("--verify", action="store_true", help="compare shards that are there with their checksums")
    return parser.parse_args(argv)


def _write_shards(
    source: FolderSource,
    args: argparse.Namespace,
    missing: dict[str, range],
    journal: Journal,
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
                    shard, reasons = future.result()
                    for name, reason in zip(shard.left_out, reasons, strict=True):
                        _warn(f"left out {name!r}: {reason}")
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


def _write_shard(name: str, indices: range) -> tuple[Shard, list[str]]:
    """Writes one file and reads it back, in a worker process; also says why each of the pictures left out is."""
    reasons = []
    with ShardWriter(_worker.out / name) as writer:
        for index in indices:
            if _worker.stop.is_set():
                raise _StoppedError
            picture = _worker.source.relative_name(index)
            try:
                image = _read_picture(index)
            except UNREADABLE as error:
                writer.leave_out(picture)
                reasons.append(said(error))
            else:
                writer.write(pack(image, _worker.source.label(index), picture))
            with _worker.done.get_lock():
                _worker.done.value += 1
    return writer.shard, reasons


def _read_picture(index: int) -> bytes:
    """The bytes of a file. One of UNREADABLE if it is to be left out."""
    path = _worker.source.name(index)
    try:
        image = Path(path).read_bytes()
    except OSError as error:
        if _worker.check:
            raise
        raise InputError(f"cannot read {path}: {error.strerror}; --check leaves out such files") from error
    if _worker.check:
        decode_image(image)
    return image


def _warn(message: str) -> None:
    tqdm.write(f"fvq_jax: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
