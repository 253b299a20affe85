"""Command line: scores a trained tokenizer on a set of pictures, by a protocol that is named beside every figure.

  python -m fvq_jax.evaluate --workdir=DIR --data=FOLDER --out=OUT [--protocol=direct|published]
  python -m fvq_jax.evaluate --tokenizer=PATH --data=photos --out=OUT --size=256 --inception=FILE

Writes OUT/metrics.json, whose content is also the last line on standard output. Metrics that look through a trained
network need its weights as a local file; those without are listed under `not_computed`, with what to get. With
`--distributed` it is one of several processes, of which the first writes. Exit codes: 0, and 2 for bad input.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fvq_jax.command import Parser, fail, join_processes, true_or_false
from fvq_jax.data.sources import Source, make_source
from fvq_jax.errors import InputError
from fvq_jax.evals.image_file import ImageWriter
from fvq_jax.evals.networks import FILES, load_networks, option
from fvq_jax.evals.protocol import PROTOCOLS
from fvq_jax.evals.reference import Reference
from fvq_jax.evals.suite import collect, not_computed, summarise
from fvq_jax.pretrained import Tokenizer
from fvq_jax.saved_tokenizer import CONFIG

METRICS, NPZ = "metrics.json", "reconstructions.npz"
SIZE = 256  # unless a workdir says what it was trained on


def main(argv: list[str] | None = None) -> int:
    """Evaluates; returns the exit code."""
    args = _parse(argv)
    try:
        if args.distributed:
            join_processes()
        report = evaluate(args)
        if jax.process_index() == 0:
            _write(args.out / METRICS, json.dumps(report, indent=2) + "\n")
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()
    except InputError as error:
        return fail(str(error))
    return 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """What `metrics.json` holds; {} in all processes but the first. InputError for bad input."""
    if args.batch < 1 or args.images < 0:
        raise InputError(f"--batch must be at least 1 and --images at least 0, not {args.batch} and {args.images}")
    if args.save_npz and jax.process_count() > 1:
        raise InputError("--save-npz writes the pictures of one process: evaluate without --distributed")
    _make_folder(args.out)  # before hours of work, not after
    path = args.workdir or args.tokenizer
    size = args.size or _trained_size(path)
    tokenizer = Tokenizer.from_pretrained(path, l2_norm=args.l2_norm)
    source = _source(args.data, size, args.images)
    networks = load_networks({name: getattr(args, name) for name in FILES}, size)
    first = jax.process_index() == 0
    reference, known = None, None
    if networks.inception is not None:
        what = {"protocol": args.protocol, "size": size, "images": args.images, "weights": args.inception}
        reference = Reference.of(args.reference_cache, source, **what)
        known = reference.load() if first else None
    total = min(args.images or len(source), len(source))
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ImageWriter(args.out / NPZ, size, size)) if args.save_npz else None
        bar = tqdm(total=total, unit=" images", desc=f"evaluating ({args.protocol})", disable=not first)
        sums = collect(
            tokenizer,
            source,
            networks,
            protocol=args.protocol,
            size=size,
            batch_size=args.batch,
            images=args.images,
            with_reference=not _of_first_process(known is not None),
            writer=writer,
            progress=stack.enter_context(bar).update,
        )
    if not first:
        return {}
    moments = known
    if sums.real is not None and sums.images >= 2:
        moments = sums.real.moments()
        reference.save(moments)
    return {
        "tokenizer": repr(tokenizer),
        "path": str(path),
        "data": args.data,
        "pictures": source.fingerprint(),
        "protocol": args.protocol,
        "protocol_means": PROTOCOLS[args.protocol],
        "size": size,
        "images": int(sums.images),
        "skipped_files": int(sums.skipped),
        "tokens": int(sums.code_counts.sum()),
        "codebook_size": len(sums.code_counts),
        **summarise(sums, tokenizer, moments),
        "reference": None if moments is None else {"path": str(reference.path), "cached": known is not None},
        "not_computed": not_computed(networks, sums),
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="fvq_jax.evaluate", description="Scores a trained tokenizer.")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--workdir", metavar="DIR", type=Path, help="of a training run: its newest checkpoint")
    tokenizer.add_argument("--tokenizer", metavar="PATH", type=Path, help="checkpoint file or saved tokenizer")
    parser.add_argument("--l2_norm", type=true_or_false, help="unit-length codes? for checkpoints that do not say")
    parser.add_argument(
        "--data",
        required=True,
        help="folder of pictures, or photos: the bundled ones (a folder of that name: ./photos)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="where metrics.json goes")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="direct",
        help="; ".join(f"{name}: {meaning}" for name, meaning in PROTOCOLS.items()) + " (default: direct)",
    )
    parser.add_argument("--size", type=int, help=f"side of the crops (default: as trained, or else {SIZE})")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time, of all processes (default: 64)")
    parser.add_argument("--images", type=int, default=0, help="how many, evenly spaced (default: 0, all)")
    for name, what in FILES.items():
        parser.add_argument(option(name), metavar="FILE", type=Path, help=what)
    parser.add_argument("--save-npz", action="store_true", help=f"also write DIR/{NPZ} for ADM's evaluation suite")
    parser.add_argument(
        "--reference-cache",
        metavar="DIR",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvq_jax",
        help="where statistics of real pictures are kept (default: %(default)s)",
    )
    parser.add_argument("--distributed", action="store_true", help="one of several processes, as in fvq_jax.main")
    return parser.parse_args(argv)


def _source(data: str, size: int, images: int) -> Source:
    kind = "photos" if data == "photos" else "folder"
    return make_source(kind, "eval", image_size=size, train_dir="", eval_dir=data, eval_images=images)


def _trained_size(path: Path) -> int:
    """The size of the crops that a workdir's run was trained on, `SIZE` for anything else."""
    try:
        return int(json.loads((path / CONFIG).read_text())["data"]["image_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return SIZE  # what cannot be read at all is reported when the tokenizer is loaded


def _of_first_process(flag: bool) -> bool:
    """What `flag` is in the first process, in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag))) if jax.process_count() > 1 else flag


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
