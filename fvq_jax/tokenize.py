"""Command line: pictures to codes, and back.

  python -m fvq_jax.tokenize encode FOLDER CODES.npz --tokenizer=PATH --size=256
  python -m fvq_jax.tokenize decode CODES.npz FOLDER --tokenizer=PATH
  python -m fvq_jax.tokenize extract --tokenizer=PATH --data=DATA --out=DIR --size=256 --crops=ten --scales=1.1,1.05

FOLDER may be a single picture too. `encode` writes `codes` int32 [N, h, w] of central crops (of another shape if the
quantizer has levels or scales), and `names` [N], paths below the folder; `decode` takes files without `names` too, and
numbers the pictures. PATH is anything that `Tokenizer.from_pretrained` reads. Files that are no readable pictures are
named and skipped. Memory does not grow with the number of pictures, except for their sorted names (about 100 bytes
each).

`extract` writes what a generator is trained on: the codes of several crops of every picture, with its label and name,
in shards (see `data.extraction`). DATA is a folder of pictures, one that `fvq_jax.data.prepare` wrote, `photos` (the
bundled ones) or `tfds:NAME[:SPLIT]`. It may be killed at any moment, and goes on where it was when it is started again.
With `--distributed` it is one of several processes, which share the work.

Exit codes: 0 done, 2 bad input, 75 `extract` was interrupted (start it again), 130 or 143 the others were (SIGINT,
SIGTERM), 1 if pictures stop coming, a process is lost or memory runs out.
"""

import argparse
import collections
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Literal

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from fvq_jax.data.croppings import Cropping
from fvq_jax.data.decode import UnreadableImageError, open_image
from fvq_jax.data.extraction import Encoder, Work, extract
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.npz_rows import CodeReader, CodeWriter
from fvq_jax.data.record import Source
from fvq_jax.data.sources import kind_of, make_source
from fvq_jax.data.transforms import resize_center
from fvq_jax.inference.class_tables import condition_of, labels_for
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.ops.pixels import to_uint8
from fvq_jax.runtime import exits
from fvq_jax.runtime.agreement import everywhere
from fvq_jax.runtime.arguments import Parser, add_place, class_or_null, place, some_path, some_text, true_or_false
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.files import replace_whole
from fvq_jax.runtime.interrupt import Interrupt

Crop = UInt8[np.ndarray, "s s 3"] | str  # of a file that cannot be read, the reason
_THREADS = min(8, os.cpu_count() or 1)
# A data set's own name may end in :VERSION, which begins with a digit; a split may hold a colon, as in train[:90%].
_TFDS = re.compile(r"tfds:(?P<name>[^:]+(:[\d*][^:]*)?)(:(?P<split>[A-Za-z].*))?")


def main(argv: list[str] | None = None) -> int:
    """Encodes or decodes; returns the exit code."""
    args = _parse(argv)
    where = place(args) if args.command == "extract" else None
    kept = {
        "encode": "nothing was written",
        "decode": "the pictures written so far are whole",
        "extract": "whole shards are kept, start me again",
    }
    join, resumes = where.join if where else None, args.command == "extract"
    return exits.run(lambda: _tokenize(args), join, kept=kept[args.command], resumes=resumes)


def _tokenize(args: argparse.Namespace) -> int:
    if args.command == "extract":
        return _extract(args)
    if args.batch < 1:
        raise InputError(f"--batch must be at least 1, not {args.batch}")
    if args.command == "encode":
        message = encode(args.source, args.target, args.tokenizer, args.size, args.batch, args.l2_norm, args.condition)
    else:
        message = decode(args.source, args.target, args.tokenizer, args.batch, args.l2_norm, args.condition)
    sys.stdout.write(f"{message}\n")
    return 0


def encode(
    source: Path,
    target: Path,
    tokenizer_path: Path,
    size: int,
    batch: int,
    l2_norm: bool | None,
    condition: int | str | None = None,
) -> str:
    """Writes the codes of all pictures below `source` to `target`; returns what was done. InputError for bad input.

    `condition` is for a tokenizer with classes: the label of all pictures, or "null".
    """
    files = FolderSource(source)
    tokenizer = Tokenizer.from_pretrained(tokenizer_path, l2_norm=l2_norm)
    _check_one_class(tokenizer, condition)
    shape = _code_shape(tokenizer, size)
    skipped = 0
    with (
        CodeWriter(target, shape) as writer,
        tqdm(total=len(files), unit=" images", desc="encoding") as bar,
    ):
        for names, crops in _crops(files, size, batch):
            for name, crop in zip(names, crops, strict=True):
                if isinstance(crop, str):
                    bar.write(f"fvq_jax: skipped {name!r}: {crop}", file=sys.stderr)
                    skipped += 1
            good = [crop for crop in crops if not isinstance(crop, str)]
            if good:
                kept = [name for name, crop in zip(names, crops, strict=True) if not isinstance(crop, str)]
                codes = tokenizer.encode(np.stack(good), _all_of_class(condition, len(good)))
                writer.write(codes, [_below(source.parent if source.is_file() else source, name) for name in kept])
            bar.update(len(names))
        if not writer.rows:
            raise InputError(f"none of the {len(files)} files in {source} is a readable picture")
    each = " x ".join(map(str, shape))
    return f"{target}: {writer.rows} x {each} codes, {skipped} of {len(files)} files skipped"


def decode(
    source: Path,
    target: Path,
    tokenizer_path: Path,
    batch: int,
    l2_norm: bool | None,
    condition: int | str | None = None,
) -> str:
    """Writes a PNG file per row of `source` below `target`; returns what was done. InputError for bad input.

    `condition` is the one that the pictures were encoded with, see `encode`.
    """
    reader = CodeReader(source)
    tokenizer = Tokenizer.from_pretrained(tokenizer_path, l2_norm=l2_norm)
    _check_one_class(tokenizer, condition)
    written: set[Path] = set()
    with tqdm(total=reader.shape[0], unit=" images", desc="decoding") as bar:
        for codes, names in reader.batches(batch):
            pictures = tokenizer.decode(codes, _all_of_class(condition, len(codes)))
            for name, pixels in zip(names, np.asarray(to_uint8(pictures)), strict=True):
                path = _picture_path(target, name, written)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replace_whole(path) as unfinished:
                        Image.fromarray(pixels).save(unfinished, "PNG")
                except OSError as error:
                    raise InputError(f"cannot write {path}: {error.strerror or error}") from error
                written.add(path)
            bar.update(len(names))
    return f"{target}: {len(written)} pictures"


def _check_one_class(tokenizer: Tokenizer, condition: int | str | None) -> None:
    """Raises InputError unless `--condition` names a class of a tokenizer with classes, and nothing for another."""
    require(
        condition is not None or not tokenizer.classes,
        f"this tokenizer has a bridge with {tokenizer.classes} classes: give --condition, a label in "
        f"0..{tokenizer.classes - 1} for all pictures or null for no class, and the same to encode and to decode; "
        "extract gives each picture its own label",
    )
    if condition is not None:
        tokenizer.table(condition)  # says what is wrong; it is needed anyway, and kept


def _all_of_class(condition: int | str | None, rows: int) -> np.ndarray | str | None:
    """The labels that a tokenizer takes for so many pictures of this class."""
    return np.full(rows, condition) if isinstance(condition, int) else condition


def _extract(args: argparse.Namespace) -> int:
    """Extracts codes; returns the exit code."""
    with Interrupt("the program ends as soon as the batch under way is done") as interrupt:
        source, cropping, encoder = everywhere(lambda: _prepare(args))
        work = Work(args.batch, args.shard_size, args.workers, args.timeout, args.verify)
        message = extract(source, cropping, encoder, args.out, work, interrupt)
    if not message:
        signal = f"by {interrupt.signal.name}" if interrupt.signal else "in another process"
        return exits.fail(f"interrupted {signal}: start me again", exits.INTERRUPTED)
    if jax.process_index() == 0:
        sys.stdout.write(f"{message}\n")
    return 0


def _prepare(args: argparse.Namespace) -> tuple[Source, Cropping, Encoder]:
    """Checks the options of `extract` and loads what they name; InputError for whatever cannot work."""
    cropping = Cropping.parse(args.crops, args.scales, args.size, args.seed)
    source = _source(args.data, args.split, args.size)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer, l2_norm=args.l2_norm)
    shape = _code_shape(tokenizer, args.size)
    condition = condition_of(tokenizer.classes, args.condition)

    def encode(crops: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return tokenizer.encode(crops, labels_for(condition, labels))

    quantizer = tokenizer.trained_net.quantizer
    if quantizer.level_names and jax.process_index() == 0:
        sys.stderr.write(f"fvq_jax: codes with levels or scales cannot train the generator: {tokenizer}\n")
    path = os.path.abspath(args.tokenizer) if args.tokenizer.exists() else str(args.tokenizer)  # of Hugging Face
    return source, cropping, Encoder(encode, tokenizer.fingerprint, path, quantizer.size, shape, condition)


def _source(data: str, split: str | None, size: int) -> Source:
    """The pictures that `--data` and `--split` name."""
    which: Literal["train", "eval"] = "eval" if split == "eval" else "train"
    if found := _TFDS.fullmatch(data):
        train, held_out = (found["split"] or usual for usual in ("train", "validation"))
        return make_source(
            "tfds", which, image_size=size, tfds_name=found["name"], train_split=train, eval_split=held_out
        )
    kind = kind_of(data)
    if split is not None and kind != "photos":
        raise InputError(f"--split={split} is for photos and tfds: give --data the folder of that split")
    return make_source(kind, which, image_size=size, train_dir=data, eval_dir=data)


def _code_shape(tokenizer: Tokenizer, size: int) -> tuple[int, ...]:
    """The shape of the codes of a crop. InputError, naming the option, for a size that does not fit."""
    try:
        return tokenizer.code_shape(size, size)
    except InputError as error:
        raise InputError(f"--size {size}: {error}") from None


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="fvq_jax.tokenize", description="Pictures to codes and back.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="encode|decode|extract")
    for name, source, target in (("encode", "FOLDER", "CODES.npz"), ("decode", "CODES.npz", "FOLDER")):
        command = commands.add_parser(name, help=f"{source} to {target}")
        command.add_argument("source", metavar=source, type=some_path)
        command.add_argument("target", metavar=target, type=some_path)
        _add_tokenizer(command)
        command.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
        command.add_argument(
            "--condition",
            type=class_or_null,
            metavar="LABEL|null",
            help="what a bridge with classes is given for all pictures: a label, or null for no class",
        )
        if name == "encode":
            command.add_argument("--size", required=True, type=int, help="side of the central crop, in pixels")
    _add_extract(commands.add_parser("extract", help="pictures to a folder of codes to train a generator on"))
    return parser.parse_args(argv)


def _add_tokenizer(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokenizer", required=True, type=some_path, help="checkpoint, saved tokenizer or workdir")
    command.add_argument("--l2_norm", type=true_or_false, help="whether codes have unit length, if a file does not say")


def _add_extract(command: argparse.ArgumentParser) -> None:
    _add_tokenizer(command)
    command.add_argument(
        "--data",
        required=True,
        type=some_text,
        help="folder of pictures or of prepared files, photos, or tfds:NAME[:SPLIT]",
    )
    command.add_argument("--split", choices=("train", "eval"), help="of photos and tfds (default: train)")
    command.add_argument("--out", required=True, metavar="DIR", type=some_path, help="new folder, or one begun before")
    command.add_argument("--size", type=int, default=256, help="side of a crop, in pixels (default: 256)")
    command.add_argument(
        "--crops",
        default="center",
        help="center; ten (corners and centre, and the same mirrored); or random:N, half of them mirrored "
        "(default: center)",
    )
    command.add_argument(
        "--scales",
        metavar="S,S,...",
        help="the shorter side of the picture before it is cropped, in units of --size (default: 1 for center, "
        "1.1,1.05 for ten, not resized for random)",
    )
    command.add_argument("--seed", type=int, default=0, help="of random crops (default: 0)")
    command.add_argument(
        "--condition",
        choices=("label", "null"),
        help="what a bridge with classes is given: the label of each picture, or null for no class",
    )
    command.add_argument(
        "--batch", type=int, default=64, help="crops at a time in each process (default: 64; 16 per device are enough)"
    )
    command.add_argument(
        "--workers", type=int, default=0, help="processes that read pictures, beside each process (default: 0, threads)"
    )
    command.add_argument("--shard-size", type=int, default=4096, help="pictures in one file (default: 4096)")
    command.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="seconds to wait for a picture; 0: no limit (default: 300)",
    )
    command.add_argument("--verify", action="store_true", help="compare shards that are there with their checksums")
    add_place(command)


def _crops(files: FolderSource, size: int, batch: int) -> Iterator[tuple[list[str], list[Crop]]]:
    """Names and crops in batches; one batch is read ahead."""

    def load(name: str) -> Crop:
        try:
            return resize_center(open_image(name), size)
        except UnreadableImageError as error:
            return str(error)

    waiting: collections.deque[tuple[list[str], list[Future[Crop]]]] = collections.deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(files), batch):
            names = [files.name(index) for index in range(start, min(start + batch, len(files)))]
            waiting.append((names, [pool.submit(load, name) for name in names]))
            if len(waiting) == 2:
                yield _results(*waiting.popleft())
        while waiting:
            yield _results(*waiting.popleft())


def _results(names: list[str], futures: list[Future[Crop]]) -> tuple[list[str], list[Crop]]:
    return names, [future.result() for future in futures]


def _below(folder: Path, name: str) -> str:
    return PurePath(os.path.relpath(name, os.path.abspath(folder))).as_posix()


def _picture_path(folder: Path, name: str, taken: set[Path]) -> Path:
    """Where the picture of this name goes. A file of codes may come from anywhere: it must not lead out of `folder`."""
    relative = PurePath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise InputError(f"the name {name!r} in the file of codes is not a path below a folder")
    path = folder / relative.with_suffix(".png")
    return path if path not in taken else folder / f"{relative}.png"  # a.jpg and a.png stay two files


if __name__ == "__main__":
    sys.exit(main())
