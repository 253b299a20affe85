"""Command line: `python -m fvq_jax.convert SRC DST --layout=jax|llamagen|fvq|...`.

SRC is a published checkpoint (.pt, .pth, .ckpt, .safetensors) of a tokenizer in one of the layouts that docs/parity.md
lists or of LlamaGen's class-conditional generator, or a folder that holds one: saved by this package, or a training
workdir. DST is a file, or for the layout jax a folder.
Prints what SRC was recognised as. Reading a large file shows its progress. Writing cannot:
it is one call of safetensors or PyTorch (seconds per GB). Exit codes: 0, and 2 for input that cannot be converted.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from fvq_jax.inference.generator import Generator
from fvq_jax.inference.saved import SavedTokenizer, load
from fvq_jax.inference.saved_generator import SavedGenerator, is_generator, load_generator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.interop.layouts import LAYOUTS
from fvq_jax.models.gpt import SIZES
from fvq_jax.models.quantizers import Quantizer, VectorQuantizer, quantizer_settings
from fvq_jax.models.quantizers.bridge import parse_bridge
from fvq_jax.runtime import exits
from fvq_jax.runtime.arguments import Parser, class_or_null, grid_sides, some_path, true_or_false, whole_numbers
from fvq_jax.runtime.errors import require

LARGE = 100e6  # bytes; reading a file of this size or more shows a progress bar
VARIANTS = {  # by the kind of bridge
    "none": "plain VQ tokenizer",
    "linear": "FVQ tokenizer with a linear bridge",
    "mlp5": "FVQ tokenizer with an MLP bridge",
    "vit": "FVQ tokenizer with a ViT bridge",
    "dit": "FVQ tokenizer with a DiT bridge",
}


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit code."""
    parser = Parser(prog="fvq_jax.convert", description="Converts tokenizers and generators between layouts.")
    parser.add_argument(
        "source", metavar="SRC", type=some_path, help="checkpoint file, saved folder or training workdir"
    )
    parser.add_argument("target", metavar="DST", type=some_path, help="file to write, or folder for --layout=jax")
    parser.add_argument("--layout", choices=("jax", *LAYOUTS), default="jax", help="what to write (default: jax)")
    parser.add_argument("--source_layout", choices=tuple(LAYOUTS), help="the layout of SRC, if its tensors do not tell")
    parser.add_argument(
        "--scales", type=whole_numbers, help="sides of the grids of codes, such as 1,2,4, if SRC has several scales"
    )
    parser.add_argument("--l2_norm", type=true_or_false, help="whether codes have unit length, if SRC does not say")
    parser.add_argument(
        "--condition",
        type=class_or_null,
        help="label or null: whose table a layout without bridge holds, if classes have their own",
    )
    parser.add_argument("--heads", type=int, help="attention heads of a generator, if SRC does not say")
    parser.add_argument(
        "--grid", type=grid_sides, help="rows x columns of its codes, such as 16x16, if SRC does not say"
    )
    parser.add_argument("--classes", type=int, help="its classes, if SRC does not say and has no row for no class")
    args = parser.parse_args(argv)
    return exits.run(lambda: _convert(args))


def _convert(args: argparse.Namespace) -> int:
    layout = None if args.layout == "jax" else args.layout
    generator = is_generator(args.source)
    kind, foreign = (
        ("generator", ("l2_norm", "condition", "source_layout", "scales"))
        if generator
        else ("tokenizer", ("heads", "grid", "classes"))
    )
    for name in foreign:
        require(getattr(args, name) is None, f"{args.source} is a {kind}, which --{name} is not for: leave it out")
    if generator:
        require(layout in (None, "llamagen"), f"a generator has no layout {layout}: use --layout=llamagen or jax")
        keywords = {"heads": args.heads, "grid": args.grid, "classes": args.classes}
        made = load_generator(args.source, **keywords, track=_progress(args.source))
        text, save = describe_generator(made), Generator(made).save_pretrained
    else:
        saved = load(
            args.source,
            layout=args.source_layout,
            l2_norm=args.l2_norm,
            scales=args.scales,
            track=_progress(args.source),
        )
        text = describe(saved)
        save = functools.partial(Tokenizer(saved).save_pretrained, condition=args.condition)
    sys.stdout.write(f"{args.source}: {text}\n")
    sys.stdout.flush()
    save(args.target, layout)
    files = [args.target] if args.target.is_file() else list(args.target.iterdir())
    size = sum(file.stat().st_size for file in files)
    sys.stdout.write(f"{args.target}: written, layout {args.layout}, {size / 1e6:,.1f} MB\n")
    return 0


def describe(saved: SavedTokenizer) -> str:
    """Variant, parameters, codes, bridge and shape of a tokenizer, and the layout it was in, in one line."""
    net, quantizer = saved.net, saved.net.quantizer
    layout = f", read as {saved.layout}, {LAYOUTS[saved.layout].title}" if saved.layout else ""
    return (
        f"{_variant(quantizer)}, {_size(saved.params):,} parameters, {quantizer.size} x {quantizer.latent_dim} codes, "
        f"{quantizer.description}, down-sampling {net.downsampling}{layout}"
    )


def describe_generator(saved: SavedGenerator) -> str:
    """Size, parameters, codes and classes of a generator, in one line."""
    net = saved.net
    shape = (net.layers, net.width, net.heads)
    named = [f"LlamaGen-{name}, " for name, size in SIZES.items() if dataclasses.astuple(size) == shape]
    null = "and no class" if net.class_dropout > 0 else "without one for no class"
    return (
        f"class-conditional generator, {''.join(named)}{_size(saved.params):,} parameters, {net.layers} layers of "
        f"width {net.width} with {net.heads} heads, {net.grid[0]} x {net.grid[1]} codes out of {net.vocab}, "
        f"{net.classes} classes {null}"
    )


def _size(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


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
