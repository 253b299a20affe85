"""Command line: a folder of pictures to a file of codes, and back to pictures.

  python -m fvq_jax.tokenize encode FOLDER CODES.npz --tokenizer=PATH --size=256
  python -m fvq_jax.tokenize decode CODES.npz FOLDER --tokenizer=PATH

`encode` writes `codes` int32 [N, h, w] of central crops, and `names` [N], paths below the folder. PATH is anything that
`Tokenizer.from_pretrained` reads. Files that are no readable pictures are named and skipped. Memory does not grow with
the number of pictures, except for their sorted names (about 100 bytes each). Exit codes: 0, and 2 for bad input.
"""

import argparse
import collections
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from fvq_jax.data.decode import UnreadableImageError, open_image
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.npz_rows import CodeReader, CodeWriter
from fvq_jax.data.transforms import resize_center
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.ops.pixels import to_uint8
from fvq_jax.runtime import exits
from fvq_jax.runtime.arguments import Parser, true_or_false
from fvq_jax.runtime.errors import InputError

Crop = UInt8[np.ndarray, "s s 3"] | None  # None for a file that cannot be read
_THREADS = min(8, os.cpu_count() or 1)


def main(argv: list[str] | None = None) -> int:
    """Encodes or decodes; returns the exit code."""
    args = _parse(argv)
    return exits.run(lambda: _tokenize(args))


def _tokenize(args: argparse.Namespace) -> int:
    if args.batch < 1:
        raise InputError(f"--batch must be at least 1, not {args.batch}")
    if args.command == "encode":
        message = encode(args.source, args.target, args.tokenizer, args.size, args.batch, args.l2_norm)
    else:
        message = decode(args.source, args.target, args.tokenizer, args.batch, args.l2_norm)
    sys.stdout.write(f"{message}\n")
    return 0


def encode(source: Path, target: Path, tokenizer_path: Path, size: int, batch: int, l2_norm: bool | None) -> str:
    """Writes the codes of all pictures below `source` to `target`; returns what was done. InputError for bad input."""
    files = FolderSource(source)
    tokenizer = Tokenizer.from_pretrained(tokenizer_path, l2_norm=l2_norm)
    factor = tokenizer.downsampling
    if size < 1 or size % factor:
        raise InputError(f"--size {size} is not divisible by the down-sampling of {factor}: use a multiple of it")
    skipped = 0
    with (
        CodeWriter(target, size // factor, size // factor) as writer,
        tqdm(total=len(files), unit=" images", desc="encoding") as bar,
    ):
        for names, crops in _crops(files, size, batch):
            for name, crop in zip(names, crops, strict=True):
                if crop is None:
                    bar.write(f"fvq_jax: skipped {name!r}: not a readable picture", file=sys.stderr)
                    skipped += 1
            good = [crop for crop in crops if crop is not None]
            if good:
                kept = [name for name, crop in zip(names, crops, strict=True) if crop is not None]
                writer.write(tokenizer.encode(np.stack(good)), [_below(source, name) for name in kept])
            bar.update(len(names))
        if not writer.rows:
            raise InputError(f"none of the {len(files)} files in {source} is a readable picture")
    height = size // factor
    return f"{target}: {writer.rows} x {height} x {height} codes, {skipped} of {len(files)} files skipped"


def decode(source: Path, target: Path, tokenizer_path: Path, batch: int, l2_norm: bool | None) -> str:
    """Writes a PNG file per row of `source` below `target`; returns what was done. InputError for bad input."""
    reader = CodeReader(source)
    tokenizer = Tokenizer.from_pretrained(tokenizer_path, l2_norm=l2_norm)
    written: set[Path] = set()
    with tqdm(total=reader.shape[0], unit=" images", desc="decoding") as bar:
        for codes, names in reader.batches(batch):
            for name, pixels in zip(names, np.asarray(to_uint8(tokenizer.decode(codes))), strict=True):
                path = _picture_path(target, name, written)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
                except OSError as error:
                    raise InputError(f"cannot write {path}: {error.strerror or error}") from error
                written.add(path)
            bar.update(len(names))
    return f"{target}: {len(written)} pictures"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="fvq_jax.tokenize", description="Pictures to codes and back.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="encode|decode")
    for name, source, target in (("encode", "FOLDER", "CODES.npz"), ("decode", "CODES.npz", "FOLDER")):
        command = commands.add_parser(name, help=f"{source} to {target}")
        command.add_argument("source", metavar=source, type=Path)
        command.add_argument("target", metavar=target, type=Path)
        command.add_argument("--tokenizer", required=True, type=Path, help="checkpoint, saved tokenizer or workdir")
        command.add_argument("--batch", type=int, default=64, help="images at a time (default: 64)")
        command.add_argument(
            "--l2_norm", type=true_or_false, help="whether codes have unit length, if a file does not say"
        )
        if name == "encode":
            command.add_argument("--size", required=True, type=int, help="side of the central crop, in pixels")
    return parser.parse_args(argv)


def _crops(files: FolderSource, size: int, batch: int) -> Iterator[tuple[list[str], list[Crop]]]:
    """Names and crops in batches; one batch is read ahead."""

    def load(name: str) -> Crop:
        try:
            return resize_center(open_image(name), size)
        except UnreadableImageError:
            return None

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
