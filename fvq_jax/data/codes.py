"""Pictures as codes, with their labels: what the generator is trained on.

`open_codes` reads two layouts: the folders that `python -m fvq_jax.tokenize extract` writes (`extracted_codes`), and
the files that LlamaGen's program writes (`llamagen_codes`). `code_batches` and `held_out_batches` make batches of both.
"""

import functools
import os
from typing import Any

import numpy as np

from fvq_jax.data.code_record import CodeInfo, CodeRecord, CodeSource
from fvq_jax.data.extracted_codes import ExtractedCodes
from fvq_jax.data.llamagen_codes import LlamaGenCodes, find_codes
from fvq_jax.data.stream import Stream, endless_order, local_batches, padded_order
from fvq_jax.runtime.errors import require

__all__ = ["CodeInfo", "CodeRecord", "CodeSource", "code_batches", "held_out_batches", "open_codes"]


def open_codes(path: str | os.PathLike[str]) -> CodeSource:
    """The codes in a folder: one that `fvq_jax.tokenize extract` wrote, or one of LlamaGen's program.

    Raises InputError if there are none, writing them did not finish, or a file is missing or has another size.
    """
    return LlamaGenCodes(path) if find_codes(path) else ExtractedCodes(path)


def code_batches(
    source: CodeSource,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    vocab: int = 0,
    classes: int = 0,
) -> Stream:
    """Endless batches from step `start_step` on: `codes` int32 [b, t], flattened row by row, and `label` int32 [b].

    `batch_size` is global, and b = batch_size / process_count: process p gets rows [p*b, (p+1)*b) of the global batch.
    An epoch shows every picture once, in an order that `seed` and the epoch decide; scale and crop are drawn from
    (seed, epoch, index of the picture), uniformly. With `num_workers` 0 a few threads of this process read, otherwise
    that many processes; neither their number nor that of the hosts changes a batch.

    Raises InputError for sizes that cannot work; iteration does for a damaged record, and for a code that is not below
    `vocab` or a label that is not below `classes` (0: not checked).
    """
    load = functools.partial(_drawn, source=source, seed=seed, vocab=vocab, classes=classes)
    place = {"start_step": start_step, "process_index": process_index, "process_count": process_count}
    order = endless_order(len(source), seed).map_with_index(load)
    return Stream(local_batches(order, batch_size, **place), num_workers)


def held_out_batches(
    source: CodeSource,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    vocab: int = 0,
    classes: int = 0,
) -> Stream:
    """Every picture once, in order: `codes` and `label` as in training, of one crop, and `mask` bool [b].

    The crop is that of the centre if there is one, or else the first, at the first scale. Rows with a False `mask` fill
    up the last batch and must not count. Every process gets the same number of batches, and the same part of each as in
    `code_batches`. Raises InputError as `code_batches` does.
    """
    load = functools.partial(_in_order, source=source, vocab=vocab, classes=classes)
    place = {"process_index": process_index, "process_count": process_count}
    return Stream(local_batches(padded_order(len(source), batch_size).map(load), batch_size, **place), num_workers)


def _drawn(position: int, index: int, *, source: CodeSource, seed: int, vocab: int, classes: int) -> CodeRecord:
    """The picture `index`, which stands at `position` of the endless order."""
    rng = np.random.default_rng((seed, position // len(source), index))
    scale, crop = rng.integers(len(source.info.scales)), rng.integers(source.info.crops)
    return _row(source, index, int(scale), int(crop), vocab, classes)


def _in_order(index: int, *, source: CodeSource, vocab: int, classes: int) -> dict[str, Any]:
    if index >= len(source):
        nothing = np.zeros(source.info.length, np.int32)
        return {"codes": nothing, "label": np.int32(0), "mask": np.bool_(False)}
    return {**_row(source, index, 0, source.info.first_crop, vocab, classes), "mask": np.bool_(True)}


def _row(source: CodeSource, index: int, scale: int, crop: int, vocab: int, classes: int) -> CodeRecord:
    record = source[index]
    codes, label = record["codes"][scale, crop].reshape(-1), record["label"]
    for what, values, limit in (("code", codes, vocab), ("label", label, classes)):
        low, high = int(np.min(values)), int(np.max(values))
        require(
            not limit or 0 <= low <= high < limit,
            f"{source.name(index)} has the {what} {high if low >= 0 else low}, and {what}s must be in 0..{limit - 1}",
        )
    return {"codes": codes, "label": label}
