"""Turns pictures into a folder of codes, on one process or several, and goes on where a killed run was.

Every process writes whole shards: process p of n takes every n-th of those that are missing. Pictures are read and
cropped ahead of the device. What turns crops into codes is given, see `Encoder`. `extracted_codes` reads the folder.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int, Integer, UInt8
from tqdm import tqdm

from fvq_jax.data.croppings import Cropping
from fvq_jax.data.decode import open_stored
from fvq_jax.data.extracted_codes import CODES, pack, smallest_type
from fvq_jax.data.journal import Journal
from fvq_jax.data.prefetch import Prefetch
from fvq_jax.data.record import Source
from fvq_jax.data.shards import MANIFEST, Manifest, Shard, ShardWriter
from fvq_jax.data.stream import Stream
from fvq_jax.data.unreadable import UNREADABLE, reason, short_name
from fvq_jax.runtime.agreement import check_same, everywhere, gather_texts
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.interrupt import Interrupt

# Which option of the program stands behind a field of the manifest, for the message that another one is refused.
_OPTIONS = {
    "format": "the format",
    "tokenizer": "the tokenizer",
    "condition": "--condition",
    "size": "--size",
    "cropping": "--crops",
    "crops": "--crops, the number of them,",
    "scales": "--scales",
    "seed": "--seed",
    "shard_size": "--shard-size",
}
_NOTES = ("tokenizer_path",)  # may differ when a run goes on


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What turns crops into codes.

    Attributes:
      encode: crops uint8 [n, s, s, 3] and the class of each, int32 [n], to codes [n, *grid].
      fingerprint, path: which tokenizer this is, and where it lies.
      vocab: how many codes there are.
      grid: the shape of the codes of one crop.
      condition: what a class-conditional bridge is given: "none" if there is none, "label" or "null".
    """

    encode: Callable[[UInt8[np.ndarray, "n s s 3"], Int[np.ndarray, "n"]], Integer[np.ndarray, "n ..."]]
    fingerprint: str
    path: str
    vocab: int
    grid: tuple[int, ...]
    condition: str = "none"


@dataclasses.dataclass(frozen=True)
class Work:
    """How the work is divided.

    Attributes:
      batch: crops that go to the devices of a process at once; all those of one picture go together.
      shard_size: pictures in one file.
      workers: processes that read pictures, beside each process; 0: a few threads.
      timeout: seconds without a picture after which the run ends; 0: never.
      verify: whether the shards that are there are compared with their checksums, and not only with their sizes.
    """

    batch: int = 64
    shard_size: int = 4096
    workers: int = 0
    timeout: float = 0.0
    verify: bool = False

    def check(self) -> None:
        """Raises InputError for numbers that cannot be."""
        require(self.batch > 0 and self.shard_size > 0, "--batch and --shard-size must be at least 1")
        require(self.workers >= 0 and self.timeout >= 0, "--workers and --timeout must be at least 0")


class _StoppedError(Exception):
    """Leaves a shard unfinished, since the program was interrupted."""


def extract(source: Source, cropping: Cropping, encoder: Encoder, out: Path, work: Work, interrupt: Interrupt) -> str:
    """Writes what is missing in `out`; returns a line about what is there now, an empty one if it was interrupted.

    All processes of a run call it; they must see the same pictures, and `out` must lie on storage that they share.

    Raises:
      InputError: for bad input, and when a file cannot be written.
      DataError: no picture comes for `work.timeout` seconds; RunError if that happens in another process.
    """
    classes = list(getattr(source, "classes", ()))
    plan = {
        "format": CODES.format,
        "tokenizer": encoder.fingerprint,
        "vocab": encoder.vocab,
        "grid": list(encoder.grid),
        "dtype": smallest_type(encoder.vocab).str,
        "condition": encoder.condition,
        "size": cropping.size,
        "cropping": cropping.kind,
        "crops": cropping.crops,
        "scales": list(cropping.scales),
        "seed": cropping.seed,
        "shard_size": work.shard_size,
        "pictures": source.fingerprint(),
        "classes": len(classes),
        "class_names": classes,
    }
    everywhere(work.check)
    check_same(plan)
    plan["tokenizer_path"] = encoder.path
    starts = range(0, len(source), work.shard_size)
    ranges = {
        f"codes-{number:05d}-of-{len(starts):05d}.array_record": range(start, min(start + work.shard_size, len(source)))
        for number, start in enumerate(starts)
    }
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        make = functools.partial(Journal, out, plan, CODES, _OPTIONS, notes=_NOTES, process=jax.process_index())
        # The first process goes first: it takes over what the others of an earlier run have left.
        journal = everywhere(lambda: stack.enter_context(make()) if first else None)
        damaged = everywhere(lambda: journal.drop_damaged(verify=work.verify) if journal else [])
        journal = everywhere(lambda: journal or stack.enter_context(make()))
        for wrong in damaged:
            _warn(f"{wrong}: it is written again")
        # The others are told: their view of the file system may be older.
        names = json.loads(gather_texts(json.dumps([name for name in ranges if name not in journal.shards]))[0])
        missing = {name: ranges[name] for name in names}
        writer = _Writer(source, cropping, encoder, out, work, journal, interrupt)
        if missing and (_anywhere(interrupt.signal is not None) or not writer.write_all(missing)):
            return ""
        texts = gather_texts(json.dumps([dataclasses.asdict(shard) for shard in journal.shards.values()]))
        written = {shard.file: shard for text in texts for shard in map(Shard.of, json.loads(text))}
        shards = tuple(written[name] for name in ranges)
        everywhere(lambda: _finish(out, plan, shards, journal, changed=bool(missing)) if first else None)
    left_out = sum(len(shard.left_out) for shard in shards)
    grid = " x ".join(map(str, encoder.grid))
    condition = f", condition {encoder.condition}" if encoder.condition != "none" else ""
    return (
        f"{out}: {sum(shard.records for shard in shards):,} pictures of {len(classes):,} classes, each "
        f"{len(cropping.scales)} x {cropping.crops} crops of {grid} codes, in {len(shards):,} shards, "
        f"{sum(shard.bytes for shard in shards) / 1e9:,.2f} GB, {left_out:,} left out, "
        f"{len(missing):,} shards written now{condition}"
    )


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes shards; the fields are those of `extract`."""

    source: Source
    cropping: Cropping
    encoder: Encoder
    out: Path
    work: Work
    journal: Journal
    interrupt: Interrupt

    def write_all(self, missing: dict[str, range]) -> bool:
        """Writes these shards, every process the next one of its own; `missing` gives their pictures by their names.

        After every shard the processes wait for each other, so that an error or a signal in one ends all. False if it
        was interrupted before the last shard.
        """
        count, index, items = jax.process_count(), jax.process_index(), list(missing.items())
        rounds = [items[start : start + count] for start in range(0, len(items), count)]
        total = len(self.source)
        before = total - sum(map(len, missing.values()))
        bar = tqdm(total=total, initial=before, unit=" images", desc="extracting", disable=index > 0)
        batches = self._batches([indices for _, indices in items[index::count]])
        with contextlib.closing(bar), contextlib.closing(batches):
            for number, shards in enumerate(rounds):
                end = bar.n + sum(len(indices) for _, indices in shards)
                own = shards[index] if index < len(shards) else None
                # Others are as quick, and what they have done is known exactly at the end of the round.
                counted = functools.partial(_advance, bar, len(shards), end)
                done = everywhere(functools.partial(self._write, batches, own, counted))
                undone, signalled = _anywhere(not done), _anywhere(self.interrupt.signal is not None)
                if undone or (signalled and number + 1 < len(rounds)):
                    return False
                bar.update(end - bar.n)
        return True

    def _write(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        shard: tuple[str, range] | None,
        count: Callable[[int], None],
    ) -> bool:
        """Writes a shard, if there is one; False, and no file, if it was interrupted. `count` is told of pictures."""
        if shard is None:
            return True
        name, indices = shard
        try:
            with ShardWriter(self.out / name) as writer:
                for start in range(indices.start, indices.stop, self._block):
                    if self.interrupt.signal is not None:
                        raise _StoppedError
                    rows = range(start, min(start + self._block, indices.stop))
                    self._write_rows(writer, next(batches), rows)
                    count(len(rows))
        except _StoppedError:
            return False
        self.journal.add(writer.shard)
        return True

    def _write_rows(self, writer: ShardWriter, batch: dict[str, np.ndarray], rows: range) -> None:
        """Encodes a batch and writes its first rows, those of the pictures with these numbers."""
        images, labels = batch["image"], batch["label"]
        pictures, scales, crops = images.shape[:3]
        codes = self.encoder.encode(images.reshape(-1, *images.shape[3:]), np.repeat(labels, scales * crops))
        codes = codes.reshape(pictures, scales, crops, *self.encoder.grid).astype(smallest_type(self.encoder.vocab))
        for row, index in enumerate(rows):
            if batch["readable"][row]:
                writer.write(pack(codes[row], int(labels[row]), short_name(self.source, index)))
            else:
                name = short_name(self.source, index)
                writer.leave_out(name)
                _warn(f"left out {name!r}: {reason(self.source, index)}")

    @property
    def _block(self) -> int:
        """Pictures in a batch. Every shard begins with a new one, so its bytes do not depend on the others."""
        most = min(self.work.shard_size, len(self.source))  # the rest of a batch would be filled up in vain
        return max(1, min(most, self.work.batch // (len(self.cropping.scales) * self.cropping.crops)))

    def _batches(self, shards: list[range]) -> Prefetch[dict[str, np.ndarray]]:
        """The pictures of these shards; the last batch of a shard is filled up."""
        padded = -(-self.work.shard_size // self._block) * self._block
        load = functools.partial(_load, source=self.source, cropping=self.cropping, shards=shards, padded=padded)
        # Ends with the last picture: workers must not be left with batches that nobody takes.
        length = (len(shards) - 1) * padded + -(-len(shards[-1]) // self._block) * self._block if shards else 0
        dataset = grain.MapDataset.range(length).map(load).batch(self._block)
        return Prefetch(Stream(dataset, self.work.workers), lambda batch: batch, timeout=self.work.timeout)


def _load(position: int, *, source: Source, cropping: Cropping, shards: list[range], padded: int) -> dict[str, Any]:
    """All crops of a picture; zeros if it cannot be read, and where a shard is filled up to `padded` pictures."""
    shard, offset = shards[position // padded], position % padded
    nothing = np.zeros(cropping.shape, np.uint8), np.int32(0)
    (image, label), readable = nothing, offset < len(shard)
    if readable:
        index = shard[offset]
        try:
            record = source[index]
            image, label = cropping.cut(open_stored(record["image"], cropping.min_side), index), record["label"]
        except UNREADABLE:
            (image, label), readable = nothing, False
    return {"image": image, "label": label, "readable": np.bool_(readable)}


def _finish(out: Path, plan: dict[str, Any], shards: tuple[Shard, ...], journal: Journal, *, changed: bool) -> None:
    """Writes the manifest, unless nothing has changed since it was written."""
    for shard in shards:
        if wrong := shard.check(out):
            raise InputError(f"{wrong}: the folder must lie on storage that all processes share")
    require(any(shard.records for shard in shards), f"none of the pictures ({plan['pictures']}) can be read")
    if changed or not (out / MANIFEST).exists():
        Manifest(plan, shards).write(out)
    journal.finish()


def _advance(bar: tqdm, processes: int, end: int, pictures: int) -> None:
    """Counts so many pictures of each of the processes, but none beyond `end`."""
    bar.update(min(processes * pictures, end - bar.n))


def _anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(rows_of_all_hosts(np.array([flag])).any())


def _warn(message: str) -> None:
    tqdm.write(f"fvq_jax: {message}", file=sys.stderr)
