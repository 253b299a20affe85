"""Command line: draws pictures from a trained generator.

  python -m fvq_jax.sample --generator=PATH --tokenizer=PATH --out=DIR --random=50000 --npz
  python -m fvq_jax.sample --generator=PATH --tokenizer=PATH --out=DIR --classes=1,5,9 --per-class=8 --png

Writes DIR/grid.png, pictures of up to 80 samples, and DIR/labels.npy, the class of every sample; with --npz also
DIR/samples.npz, which ADM's evaluation suite reads (arr_0, uint8 [N, H, W, 3], and the classes as arr_1), and with
--png a file for each sample. Sample i follows from the seed, i, its class and the options of drawing, so a program that
was killed and is started again with them goes on with the same samples, also with other processes or another --batch.
The samples of --per-class are in a shuffled order: in a file that is ordered by class, the blocks of the Inception
Score would hold few classes each, and it would collapse.

The last line on standard output is JSON with `samples`, `condition` (what a tokenizer with a table per class was given,
or none), `seconds`, `samples_per_second` and `files`. With --distributed it is one of several processes, and only the
first one writes. Exit codes: 0, 2 for bad input, and 75 if it was interrupted
(start it again).
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from tqdm import tqdm

from fvq_jax.data.npz_rows import ImageWriter
from fvq_jax.data.sample_folder import SampleFolder
from fvq_jax.inference.generator import DTYPES, Generator
from fvq_jax.inference.generator_options import Sampling
from fvq_jax.inference.saved_generator import CONDITIONS, weights_digest
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.ops.pixels import ROUNDINGS, to_uint8
from fvq_jax.ops.resize import resize_bicubic
from fvq_jax.ops.sampling import SCHEDULES
from fvq_jax.report.generator import first_of_classes
from fvq_jax.report.pictures import sample_grid
from fvq_jax.runtime import exits
from fvq_jax.runtime.agreement import check_same, everywhere
from fvq_jax.runtime.arguments import Parser, add_place, grid_sides, place, some_path, true_or_false
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.files import json_text, replace_whole
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.names import did_you_mean

GRID, LABELS, NPZ, PNG = "grid.png", "labels.npy", "samples.npz", "png"
_ROWS, _COLUMNS = 10, 8  # of the grid, at most
_MOST, _LARGEST_SIDE = 10_000_000, 16_384  # samples of a class, and pixels: more could only be a mistake
_THREADS = min(8, os.cpu_count() or 1)


def main(argv: list[str] | None = None) -> int:
    """Samples; returns the exit code."""
    args = _parse(argv)
    where = place(args)
    kept = "whole batches of samples are kept, start me again"
    return exits.run(lambda: _sample(args), where.join if where else None, kept=kept, resumes=True)


def _sample(args: argparse.Namespace) -> int:
    result = sample(args)
    if jax.process_index() == 0:
        sys.stdout.write(json_text(result) + "\n")
        sys.stdout.flush()
    return 0


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """Draws what is not drawn yet, and writes all files. Returns the result line; {} in all processes but the first.

    Raises:
      InputError: for bad input; the folder has samples that were made differently, or cannot be written to.
    """
    job = everywhere(lambda: _prepare(args))
    check_same(job.settings)
    first = jax.process_index() == 0
    folder = everywhere(lambda: SampleFolder(args.out, job.settings) if first else None)
    wanted = [GRID, LABELS, *([NPZ] if args.npz else []), *([PNG] if args.png else [])]
    finished = folder is not None and folder.result is not None and _all_there(args.out, folder.result, wanted)
    if _of_first_process(int(finished)):
        return folder.result or {} if folder is not None else {}
    done = before = _of_first_process(min(folder.done, len(job.labels)) if folder is not None else 0)
    began = time.perf_counter()
    with tqdm(total=len(job.labels), initial=done, unit=" images", desc="sampling", disable=not first) as bar:
        while done < len(job.labels):
            numbers = np.arange(done, min(done + args.batch, len(job.labels)))
            _draw_part(job, numbers, min(args.batch, len(job.labels)), folder)
            done += len(numbers)
            bar.update(len(numbers))
    seconds = time.perf_counter() - began
    everywhere(lambda: _write_files(args, job, folder) if folder is not None else None)
    if folder is None:
        return {}
    made = len(job.labels) - before
    result = {
        "samples": len(job.labels),
        "condition": job.settings["condition"],
        "drawn_now": made,  # the others were there from an earlier start
        "seconds": round(seconds, 3),
        "samples_per_second": round(made / seconds, 3) if made else None,
        "files": [str(args.out / name) for name in wanted],
    }
    folder.finish(result, keep_parts=not (args.npz or args.png))
    return result


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is to be drawn.

    Attributes:
      labels: of all samples, in their order.
      settings: all that decides the samples, plain JSON.
      resize: side of the pictures, if they are resized.
    """

    generator: Generator
    labels: Int[np.ndarray, "n"]
    sampling: Sampling
    seed: int
    condition: str | None
    rounding: str
    resize: int | None
    settings: dict[str, Any]


def _prepare(args: argparse.Namespace) -> _Job:
    """Checks the options and loads what they name; InputError for whatever cannot work."""
    require(args.batch >= 1, f"--batch must be at least 1, not {args.batch}")
    require(
        args.resize is None or 1 <= args.resize <= _LARGEST_SIDE,
        f"--resize must be 1 to {_LARGEST_SIDE:,}, not {args.resize}",
    )
    require(0 <= args.seed < 2**32, f"--seed must be in 0..{2**32 - 1}, not {args.seed}")
    for option, count in (("--per-class", args.per_class), ("--random", args.random)):
        require(count is None or 1 <= count <= _MOST, f"{option} must be 1 to {_MOST:,}, not {count}")
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
    sampling.check()
    generator = Generator.from_pretrained(
        args.generator,
        Tokenizer.from_pretrained(args.tokenizer, l2_norm=args.l2_norm),
        heads=args.heads,
        grid=args.grid,
        dtype=args.dtype,
        use_ema=args.use_ema,
    )
    classes = _classes(args.classes, generator)
    order = np.random.default_rng(args.seed)
    if args.random is None:
        labels = order.permutation(np.repeat(classes, args.per_class))
    else:
        labels = order.choice(classes, args.random)
    # Wrong options are found by a batch without images, before hours of work.
    condition = generator.check_sampling(sampling, args.condition)
    assert generator.tokenizer is not None
    settings = {
        "generator": weights_digest(generator.params),
        "tokenizer": weights_digest(generator.tokenizer.params),
        "condition": condition,
        "dtype": args.dtype,
        "seed": args.seed,
        "classes": "all" if len(classes) == generator.net.classes else classes.tolist(),
        **({"per_class": args.per_class} if args.random is None else {"random": args.random}),
        **dataclasses.asdict(sampling),
        "rounding": args.rounding,
        "resize": args.resize,
    }
    return _Job(generator, labels, sampling, args.seed, args.condition, args.rounding, args.resize, settings)


def _draw_part(job: _Job, numbers: Int[np.ndarray, "n"], batch: int, folder: SampleFolder | None) -> None:
    """Draws the samples of these numbers, every process some of them, and adds them to the folder, if there is one."""
    count, index = jax.process_count(), jax.process_index()
    each = -(-batch // count)
    # Always the same number of rows, for all processes and without compiling again at the end: some are drawn twice.
    own = numbers[np.minimum(np.arange(each * index, each * (index + 1)), len(numbers) - 1)]

    def draw() -> UInt8[np.ndarray, "each H W 3"]:
        options = dataclasses.asdict(job.sampling)
        drawn = job.generator.sample(job.labels[own], job.seed, numbers=own, condition=job.condition, **options)
        if not np.isfinite(drawn).all():
            raise InputError(f"the samples of {job.generator} are not finite: its weights are broken")
        pictures = drawn if job.resize is None else resize_bicubic(drawn, job.resize, job.resize)
        return np.asarray(to_uint8(pictures, job.rounding))

    images = rows_of_all_hosts(everywhere(draw))[: len(numbers)]
    everywhere(lambda: folder.add(images) if folder is not None else None)


def _write_files(args: argparse.Namespace, job: _Job, folder: SampleFolder) -> None:
    """Writes all files from the parts; InputError if they cannot be written."""
    positions, columns = _to_show(job.labels)
    shown: dict[int, UInt8[np.ndarray, "H W 3"]] = {}
    digits = len(str(len(job.labels) - 1))
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(job.labels), unit=" images", desc="writing files"))
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(_THREADS))
        writer = None
        for start, images in folder.parts():
            if args.npz and writer is None:
                writer = stack.enter_context(ImageWriter(args.out / NPZ, *images.shape[1:3], labels=job.labels))
            if writer is not None:
                writer.write(images)
            if args.png:
                names = [
                    args.out / PNG / f"{start + row:0{digits}d}_class_{job.labels[start + row]}.png"
                    for row in range(len(images))
                ]
                list(threads.map(_write_png, names, images))
            shown |= {at: images[at - start] for at in positions if start <= at < start + len(images)}
            bar.update(len(images))
    _write_png(args.out / GRID, sample_grid(np.stack([shown[at] for at in positions]), columns=columns))
    try:
        with replace_whole(args.out / LABELS) as unfinished, unfinished.open("wb") as file:
            np.save(file, job.labels.astype(np.int32))
    except OSError as error:
        raise InputError(f"cannot write {args.out / LABELS}: {error.strerror or error}") from error


def _to_show(labels: Int[np.ndarray, "n"]) -> tuple[list[int], int]:
    """Positions of the samples on the grid, in its order, and its columns.

    A row is a class, evenly spaced among all, if these have several samples each; else it shows the first samples.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) > 1 and counts.min() > 1:
        columns = min(_COLUMNS, int(counts.min()))
        return first_of_classes(labels, classes=_ROWS, each=columns)[0], columns
    first = labels[: _COLUMNS**2]
    return np.argsort(first, kind="stable").tolist(), math.ceil(math.sqrt(len(first)))


def _write_png(path: Path, image: UInt8[np.ndarray, "H W 3"]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_whole(path) as unfinished:
            Image.fromarray(image).save(unfinished, "PNG")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _classes(text: str, generator: Generator) -> Int[np.ndarray, "c"]:
    """The classes that a list of numbers and names stands for, each once and in its order."""
    count, names = generator.net.classes, list(generator.provenance.class_names)
    if text == "all":
        return np.arange(count)
    found = []
    for item in (part.strip() for part in text.split(",")):
        if item in names:
            found.append(names.index(item))
        elif item.isdecimal():
            require(int(item) < count, f"--classes: there is no class {item}: the generator has 0..{count - 1}")
            found.append(int(item))
        else:
            known = "its classes have no names: give numbers" if not names else "it has no class of that name"
            raise InputError(f"--classes: {item!r} is no class of the generator; {known}{did_you_mean(item, names)}")
    return np.array(list(dict.fromkeys(found)))


def _all_there(out: Path, result: dict[str, Any], wanted: list[str]) -> bool:
    return all(str(out / name) in result["files"] and (out / name).exists() for name in wanted)


def _of_first_process(number: int) -> int:
    """The number of the first process, in every process."""
    return int(rows_of_all_hosts(np.array([number], np.int64))[0])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="fvq_jax.sample", description="Draws pictures from a trained generator.")
    parser.add_argument("--generator", required=True, metavar="PATH", type=some_path, help="file, folder or workdir")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", type=some_path, help="whose codes it generates")
    parser.add_argument("--out", required=True, metavar="DIR", type=some_path, help="where all files go")
    parser.add_argument(
        "--classes", default="all", help="numbers or names, separated by commas, or all (default: %(default)s)"
    )
    count = parser.add_mutually_exclusive_group(required=True)
    count.add_argument("--per-class", type=int, metavar="N", help="so many samples of each class, in shuffled order")
    count.add_argument("--random", type=int, metavar="N", help="so many samples in all, of random classes")
    defaults = Sampling()
    parser.add_argument(
        "--guidance", type=float, default=defaults.guidance, help="its scale; 1: none (default: %(default)s)"
    )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default=defaults.schedule, help="of the guidance (default: %(default)s)"
    )
    parser.add_argument(
        "--power", type=float, default=defaults.power, help="of the cosine schedule (default: %(default)s)"
    )
    parser.add_argument(
        "--interval", type=int, default=defaults.interval, help="guide the codes 0 to INTERVAL + 1 only; -1: all"
    )
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0: the likeliest codes (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=int, default=defaults.top_k, help="of so many codes; 0: of all")
    parser.add_argument("--top_p", type=float, default=defaults.top_p, help="of codes with this probability; 1: of all")
    parser.add_argument("--seed", type=int, default=0, help="of all samples (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=64, help="samples at a time, of all processes (default: %(default)s)"
    )
    parser.add_argument("--npz", action="store_true", help=f"also write DIR/{NPZ} for ADM's evaluation suite")
    parser.add_argument("--png", action="store_true", help=f"also write a file for each sample to DIR/{PNG}")
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="round",
        help="of pixels to 0..255; " + "; ".join(f"{name}: {what}" for name, what in ROUNDINGS.items()),
    )
    parser.add_argument(
        "--resize", type=int, metavar="SIZE", help="side of the pictures, bicubic as LlamaGen's programs, such as 256"
    )
    parser.add_argument(
        "--condition", choices=CONDITIONS, help="what a tokenizer with a table per class is given (default: as trained)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the generator (default: %(default)s)")
    parser.add_argument("--use_ema", type=true_or_false, help="whether to take the moving average from a workdir")
    parser.add_argument("--heads", type=int, help="attention heads, if the generator's file does not say")
    parser.add_argument(
        "--grid", type=grid_sides, help="rows x columns of codes, such as 16x16, if the generator's file does not say"
    )
    parser.add_argument(
        "--l2_norm", type=true_or_false, help="whether codes have unit length, if the tokenizer's file does not say"
    )
    add_place(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
