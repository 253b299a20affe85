"""The options of `fvq_jax.evaluate`, and which of them belong to what is scored."""

import argparse
import os
from pathlib import Path

from fvq_jax.evals.networks import FILES, option
from fvq_jax.evals.protocol import PROTOCOLS
from fvq_jax.evaluate.samples import OF_DRAWING, OF_SAMPLES, add_arguments
from fvq_jax.runtime.arguments import Parser, add_place, listed_paths, some_path, some_text, true_or_false

NPZ = "reconstructions.npz"
_SCORED = {"tokenizer": "a tokenizer", "samples": "stored samples", "generator": "a generator"}
_OF_RECONSTRUCTIONS = (  # options that only the scoring of a tokenizer has
    *("compare", "l2_norm", "data", "protocol", "size", "images", "crops", "save_npz"),
    *(name for name in FILES if name != "inception"),
)
SIZE = 256  # of the crops, unless a workdir says on which size it was trained


def _paths(text: str) -> list[Path]:
    """The paths between the commas; an error of the option if there are none."""
    paths = [Path(path) for path in listed_paths(some_text(text))]
    if not paths:
        raise argparse.ArgumentTypeError("names no tokenizer")
    return paths


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; ends the program with one line if they do not fit each other."""
    parser = Parser(prog="fvq_jax.evaluate", description="Scores a trained tokenizer, or samples of a generator.")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--workdir", metavar="DIR", type=some_path, help="of a training run: its newest checkpoint")
    tokenizer.add_argument("--tokenizer", metavar="PATH", type=some_path, help="checkpoint file or saved tokenizer")
    tokenizer.add_argument(
        "--samples",
        metavar="PATHS",
        type=some_text,
        help="generated pictures instead of a tokenizer: .npz files with arr_0, or folders of pictures, with commas "
        "between them",
    )
    parser.add_argument(
        "--compare",
        metavar="PATHS",
        type=_paths,
        default=[],
        help="further tokenizers (workdirs, folders or files, with commas between them) that are scored on the same "
        "pictures and shown side by side with the first",
    )
    parser.add_argument("--l2_norm", type=true_or_false, help="whether codes have unit length, if a file does not say")
    parser.add_argument(
        "--data",
        type=some_text,
        help="folder of pictures or of prepared ArrayRecord files, or photos: the bundled ones (for a folder of that "
        "name: ./photos); not needed with --workdir",
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=some_path, help="where metrics.json and report/ go")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="direct",
        help="; ".join(f"{name}: {meaning}" for name, meaning in PROTOCOLS.items()) + " (default: direct)",
    )
    parser.add_argument("--size", type=int, help=f"side of the crops (default: as trained, or else {SIZE})")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time, of all processes (default: 64)")
    parser.add_argument(
        "--images", type=int, default=0, help="how many, evenly spaced (default: 0, all; of a workdir as the run)"
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=0,
        help="score this many random crops, resized and placed as in training, instead of one crop of every picture "
        "(default: as the run in the workdir, or else 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --crops, or of samples (default: 0)")
    for name, what in FILES.items():
        parser.add_argument(option(name), metavar="FILE", type=some_path, help=what)
    parser.add_argument(
        "--condition",
        choices=("label", "null"),
        help="which table of a tokenizer with one per class: that of the label of each picture, or that of no class; "
        "with --generator the default is that of the generator's codes",
    )
    parser.add_argument("--save-npz", action="store_true", help=f"also write DIR/{NPZ} for ADM's evaluation suite")
    parser.add_argument(
        "--reference-cache",
        metavar="DIR",
        type=some_path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvq_jax",
        help="where statistics of real pictures are kept (default: %(default)s)",
    )
    add_arguments(parser)
    add_place(parser)
    args = parser.parse_args(argv)
    _check_belongs(parser, args)
    return args


def _check_belongs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with one line if an option was given that would be ignored."""
    kind = "generator" if args.generator is not None else "samples" if args.samples is not None else "tokenizer"
    if kind == "generator" and args.tokenizer is None:
        parser.error("--generator needs --tokenizer=PATH, the tokenizer of its codes")
    ignored = {
        "tokenizer": (*OF_SAMPLES, *OF_DRAWING),
        "samples": (*_OF_RECONSTRUCTIONS, *OF_DRAWING, "seed", "condition"),
        "generator": _OF_RECONSTRUCTIONS,
    }[kind]
    for name in ignored:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} says nothing about the scoring of {_SCORED[kind]}: leave it out")
