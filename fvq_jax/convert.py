"""Command line: `python -m fvq_jax.convert SRC DST --layout=jax|llamagen|fvq`.

SRC is a published checkpoint (.pt, .pth, .safetensors), a saved tokenizer or a training workdir; DST a file, or for the
layout jax a folder. Prints what SRC was recognised as. Reading a large file shows its progress; writing is one call of
safetensors or PyTorch, seconds per GB, and cannot. Exit codes: 0, and 2 for input that cannot be converted.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
from tqdm import tqdm

from fvq_jax.command import Parser, fail, true_or_false
from fvq_jax.errors import InputError
from fvq_jax.models.bridge import parse_bridge
from fvq_jax.pretrained import LAYOUTS, Tokenizer
from fvq_jax.saved_tokenizer import SavedTokenizer, load

LARGE = 100e6  # bytes of a file from which on there is a progress bar
VARIANTS = {
    "none": "plain VQ tokenizer (LlamaGen)",
    "linear": "FVQ tokenizer with a linear bridge",
    "mlp5": "FVQ tokenizer with an MLP bridge",
    "vit": "FVQ tokenizer with a ViT bridge",
    "dit": "FVQ tokenizer with a DiT bridge",
}


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit code."""
    parser = Parser(prog="fvq_jax.convert", description="Converts tokenizers between layouts.")
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint file, saved tokenizer or training workdir")
    parser.add_argument("target", metavar="DST", type=Path, help="file to write, or folder for --layout=jax")
    parser.add_argument("--layout", choices=("jax", *LAYOUTS), default="jax", help="what to write (default: jax)")
    parser.add_argument("--l2_norm", type=true_or_false, help="unit-length codes? for checkpoints that do not say")
    args = parser.parse_args(argv)
    try:
        saved = load(args.source, l2_norm=args.l2_norm, track=_progress(args.source))
        sys.stdout.write(f"{args.source}: {describe(saved)}\n")
        sys.stdout.flush()
        Tokenizer(saved).save_pretrained(args.target, None if args.layout == "jax" else args.layout)
    except InputError as error:
        return fail(str(error))
    files = [args.target] if args.target.is_file() else list(args.target.iterdir())
    size = sum(file.stat().st_size for file in files)
    sys.stdout.write(f"{args.target}: written, layout {args.layout}, {size / 1e6:,.1f} MB\n")
    return 0


def describe(saved: SavedTokenizer) -> str:
    """Variant, parameters, codes, bridge and shape of a tokenizer, in one line."""
    net = saved.net
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(saved.params))
    return (
        f"{VARIANTS[parse_bridge(net.bridge).kind]}, {count:,} parameters, {net.codebook_size} x {net.code_dim} "
        f"{'unit-length ' if net.l2_normalize else ''}codes, bridge {net.bridge}, "
        f"down-sampling {2 ** (len(net.ch_mult) - 1)}"
    )


def _progress(source: Path):
    """A bar over the tensors of a large file, nothing for small ones."""
    small = not source.is_file() or source.stat().st_size < LARGE

    def track(names: Iterable[str]) -> Iterable[str]:
        return tqdm(list(names), desc=f"reading {source.name}", unit=" tensors", disable=small)

    return track


if __name__ == "__main__":
    sys.exit(main())
