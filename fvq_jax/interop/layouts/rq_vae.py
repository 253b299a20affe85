"""RQ-VAE (arXiv 2203.01941): residual levels with one codebook, which is saved once for every level.

Each copy has a last row of zeros that is no code (padding), and beside it the moving averages that made it.
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
    """The settings `codebook_size`, `code_dim` and `depth`; `prefix` stands in front of the names in the file."""
    first = f"{prefix}codebooks.0.weight"
    beside = ("quant_conv.weight 0", "quant_conv.bias 0") if prefix else ()
    return {
        "codebook_size": evidence.size(f"{first} 0") - 1,
        "code_dim": evidence.size(*beside, f"{first} 1"),
        "depth": evidence.count(rf"{re.escape(prefix)}codebooks\.(\d+)\."),
    }


def shared_book(tensors: Mapping[str, np.ndarray], prefix: str, source: str) -> np.ndarray:
    """The codebook [k, d] of all levels. InputError, which names `source`, if they do not share one."""
    books = {name: value for name, value in tensors.items() if name.startswith(f"{prefix}codebooks.")}
    first, *others = books
    for name in others:
        if not np.array_equal(books[first], books[name]):
            raise InputError(
                f"{source} has a codebook of its own in every level, and only a shared one exists here: "
                f"{first} and {name} differ"
            )
    return books[first][:-1]


def padded_books(book: np.ndarray, depth: int, prefix: str = "") -> Tensors:
    """The inverse: the copies of a codebook with the padding row."""
    padded = np.concatenate([book, np.zeros_like(book[:1])])
    return {f"{prefix}codebooks.{level}.weight": padded for level in range(depth)}


def _packed(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    others = {name: value for name, value in tensors.items() if name != _BOOK}
    return others | padded_books(tensors[_BOOK], _depth(net), "quantizer.")


def _unpacked(tensors: Mapping[str, np.ndarray], net: TokenizerNet, source: str) -> Tensors:
    others = {name: value for name, value in tensors.items() if not name.startswith("quantizer.")}
    return others | {_BOOK: shared_book(tensors, "quantizer.", source)}


def _statistics(net: TokenizerNet, tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Moving averages that would make exactly this codebook: every code chosen once."""
    book = tensors["quantizer.codebooks.0.weight"][:-1]
    found = {"cluster_size_ema": np.ones(len(book), np.float32), "embed_ema": book}
    return {
        f"quantizer.codebooks.{level}.{name}": value for level in range(_depth(net)) for name, value in found.items()
    }


def _depth(net: TokenizerNet) -> int:
    assert isinstance(net.quantizer, ResidualQuantizer)
    return net.quantizer.depth


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
