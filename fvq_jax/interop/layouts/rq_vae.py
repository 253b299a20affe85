"""RQ-VAE (arXiv 2203.01941): residual levels with a codebook each, or with one that is saved once for every level.

Each has a last row of zeros that is no code (padding), and beside it the moving averages that made it.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.evidence import Evidence
from fvq_jax.interop.layouts.conv_names import VQGAN_CONVS
from fvq_jax.interop.layouts.layout import Layout, Tensors
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError

STATISTICS = r"codebooks\.\d+\.(cluster_size_ema|embed_ema)"
_BOOK = "quantize.embedding.weight"  # the name before packing


def infer_books(evidence: Evidence, prefix: str = "") -> dict[str, Any]:
    """The settings of the quantizer that tensors show; `prefix` stands in front of the names in the file."""
    first = f"{prefix}codebooks.0.weight"
    beside = ("quant_conv.weight 0", "quant_conv.bias 0") if prefix else ()
    numbers = evidence.numbers(rf"{re.escape(prefix)}codebooks\.(\d+)\.weight")
    depth = len(numbers)
    if numbers != list(range(depth)):
        missing = next(number for number in range(depth) if number not in numbers)
        raise InputError(f"{evidence.source} lacks {prefix}codebooks.{missing}.weight, and has {numbers[-1]}")
    shared = evidence.alike(rf"{re.escape(prefix)}codebooks\.\d+\.weight")
    return {
        "codebook_size": (evidence.size(f"{first} 0") - 1) * (1 if shared else depth),
        "code_dim": evidence.size(*beside, f"{first} 1"),
        "depth": depth,
        "shared_codebook": shared,
    }


def joined_books(tensors: Mapping[str, np.ndarray], quantizer: ResidualQuantizer, prefix: str = "") -> np.ndarray:
    """The codebook [k, d] of a file: that of all levels, or row j depth + l is code j of level l."""
    levels = range(1 if quantizer.shared_codebook else quantizer.depth)
    books = [tensors[f"{prefix}codebooks.{level}.weight"][:-1] for level in levels]
    return np.stack(books, axis=1).reshape(-1, quantizer.code_dim)


def padded_books(book: np.ndarray, quantizer: ResidualQuantizer, prefix: str = "") -> Tensors:
    """The inverse: a codebook for every level, with the padding row."""

    def padded(own: np.ndarray) -> np.ndarray:
        return np.concatenate([own, np.zeros_like(own[:1])])

    depth = quantizer.depth
    shared = quantizer.shared_codebook
    books = [padded(book)] * depth if shared else [padded(book[level::depth]) for level in range(depth)]
    return {f"{prefix}codebooks.{level}.weight": own for level, own in enumerate(books)}


def _packed(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    others = {name: value for name, value in tensors.items() if name != _BOOK}
    return others | padded_books(tensors[_BOOK], _quantizer(net), "quantizer.")


def _unpacked(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    others = {name: value for name, value in tensors.items() if not name.startswith("quantizer.")}
    return others | {_BOOK: joined_books(tensors, _quantizer(net), "quantizer.")}


def _statistics(net: TokenizerNet, tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Moving averages that would make exactly these codebooks: every code chosen once."""
    found = {}
    for level in range(_quantizer(net).depth):
        book = tensors[f"quantizer.codebooks.{level}.weight"][:-1]
        found[f"quantizer.codebooks.{level}.cluster_size_ema"] = np.ones(len(book), np.float32)
        found[f"quantizer.codebooks.{level}.embed_ema"] = book
    return found


def _quantizer(net: TokenizerNet) -> ResidualQuantizer:
    assert isinstance(net.quantizer, ResidualQuantizer)
    return net.quantizer


RQ_VAE = Layout(
    name="rq_vae",
    title="RQ-VAE",
    convs=VQGAN_CONVS,
    quantizer="residual",
    infer_quantizer=lambda evidence, said: ResidualQuantizer(bridge="none", **infer_books(evidence, "quantizer.")),
    marks=(r"encoder\.down\.", r"quantizer\.codebooks\."),
    quantizer_names=r"quantizer\.codebooks\.\d+\.weight",
    unread=rf"quantizer\.{STATISTICS}",
    packed=_packed,
    unpacked=_unpacked,
    beside=_statistics,
    wrapper="state_dict",
)
