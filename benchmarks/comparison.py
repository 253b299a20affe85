"""What the benchmarks of generators share: their options, the network that these name, and the rows they write."""

import argparse
from importlib.util import find_spec

from benchmarks import limits, llama
from fvq_jax.models.gpt import SIZES, Size, hidden_width

METHODS = ("fvq_jax", "transformers", "transformers_compiled")
ALL_SIZES = SIZES | {"tiny": Size(2, 64, 4)}


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every comparison of generators has."""
    parser.add_argument("--size", choices=list(ALL_SIZES), default="B", help="default: %(default)s")
    parser.add_argument("--vocab", type=int, default=16384, help="codes (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--grid", type=int, default=16, help="side of the grid of codes (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(limits.BYTES), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=240, help="seconds for them; at least two rounds are run")
    parser.add_argument("--markdown", action="store_true", help="a table after the rows")


def finish(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, checked and with their defaults; ends the program if they cannot work."""
    args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown method {unknown.pop()!r}: use {', '.join(METHODS)}")
    if args.dtype is None:
        import jax

        args.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return args


def shape_of(args: argparse.Namespace) -> llama.Shape:
    """The network that the options name."""
    size = ALL_SIZES[args.size]
    grid, hidden = (args.grid, args.grid), hidden_width(size.width)
    return llama.Shape(args.size, size.layers, size.width, size.heads, hidden, args.vocab, args.classes, grid)


def missing() -> str:
    """Why the peer cannot run; empty if it can."""
    names = [name for name in ("torch", "transformers") if find_spec(name) is None]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not installed" if names else ""
