"""Command line: `python -m fvq_jax.convert SRC DST --layout=jax|llamagen|fvq`.

SRC is a published checkpoint (.pt, .pth, .safetensors), a saved tokenizer or a training workdir; DST a file, or for the
layout jax a folder. Prints what SRC was recognised as. Reading a large file shows its progress. Writing cannot:
it is one call of safetensors or PyTorch (seconds per GB). Exit codes: 0, and 2 for input that cannot be converted.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from tqdm import tqdm

from fvq_jax.inference.saved import SavedTokenizer, load
from fvq_jax.inference.tokenizer import LAYOUTS, Tokenizer
from fvq_jax.models.quantizers import Quantizer, VectorQuantizer, quantizer_settings
from fvq_jax.models.quantizers.bridge import parse_bridge
from fvq_jax.runtime import exits
from fvq_jax.runtime.arguments import Parser, true_or_false

LARGE = 100e6  # bytes; reading a file of this size or more shows a progress bar
VARIANTS = {  # by the kind of bridge
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
    parser.add_argument("--l2_norm", type=true_or_false, help="whether codes have unit length, if SRC does not say")
    args = parser.parse_args(argv)
    return exits.run(lambda: _convert(args))


def _convert(args: argparse.Namespace) -> int:
    saved = load(args.source, l2_norm=args.l2_norm, track=_progress(args.source))
    sys.stdout.write(f"{args.source}: {describe(saved)}\n")
    sys.stdout.flush()
    Tokenizer(saved).save_pretrained(args.target, None if args.layout == "jax" else args.layout)
    files = [args.target] if args.target.is_file() else list(args.target.iterdir())
    size = sum(file.stat().st_size for file in files)
    sys.stdout.write(f"{args.target}: written, layout {args.layout}, {size / 1e6:,.1f} MB\n")
    return 0


def describe(saved: SavedTokenizer) -> str:
    """Variant, parameters, codes, bridge and shape of a tokenizer, in one line."""
    net, quantizer = saved.net, saved.net.quantizer
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(saved.params))
    return (
        f"{_variant(quantizer)}, {count:,} parameters, {quantizer.size} x {quantizer.latent_dim} codes, "
        f"{quantizer.description}, down-sampling {net.downsampling}"
    )


def _variant(quantizer: Quantizer) -> str:
    if isinstance(quantizer, VectorQuantizer):
        return VARIANTS[parse_bridge(quantizer.bridge).kind]
    return f"{quantizer_settings(quantizer)['name']} tokenizer"


def _progress(source: Path) -> Callable[[Iterable[str]], Iterable[str]]:
    """A bar over the tensors of a large file, nothing for small ones."""
    small = not source.is_file() or source.stat().st_size < LARGE

    def track(names: Iterable[str]) -> Iterable[str]:
        return tqdm(list(names), desc=f"reading {source.name}", unit=" tensors", disable=small)

    return track


if __name__ == "__main__":
    sys.exit(main())
