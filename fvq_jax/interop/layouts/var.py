"""VAR's multi-scale tokenizer (arXiv 2404.02905), and FVQ's variant of it, which has a bridge.

Attention blocks keep queries, keys and values in one convolution `qkv`, whose rows are those of the three.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.evidence import Evidence
from fvq_jax.interop.layouts.conv_names import VQGAN_CONVS
from fvq_jax.interop.layouts.fvq import bridge_check, usage
from fvq_jax.interop.layouts.layout import Layout, Tensors
from fvq_jax.interop.layouts.quantizer_names import (
    BOOK,
    BRIDGE,
    HITS_BUFFER,
    PHI,
    USAGE_BUFFER,
    infer_book,
    infer_scales,
)
from fvq_jax.models.quantizers.multi_scale import MultiScaleQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import require

_ATTENTION = r"(?:encoder|decoder)\..*attn[^.]*(?:\.\d+)?"  # the name of a block


def _infer_quantizer(evidence: Evidence, said: Mapping[str, Any]) -> MultiScaleQuantizer:
    scales = infer_scales(evidence, said.get("scales"), "quantize.")
    return MultiScaleQuantizer(**infer_book(evidence, "quantize."), **scales)


def _packed(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    packed = {}
    for name, value in tensors.items():
        match = re.fullmatch(rf"({_ATTENTION})\.([qkv])\.(\w+)", name)
        if not match:
            packed[name] = value
        elif match[2] == "q":
            packed[f"{match[1]}.qkv.{match[3]}"] = np.concatenate(
                [tensors[f"{match[1]}.{part}.{match[3]}"] for part in "qkv"]
            )
    return packed


def _unpacked(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    plain: Tensors = {}
    for name, value in tensors.items():
        if match := re.fullmatch(rf"({_ATTENTION})\.qkv\.(\w+)", name):
            parts = zip("qkv", np.split(value, 3), strict=True)
            plain |= {f"{match[1]}.{part}.{match[2]}": rows for part, rows in parts}
        else:
            plain[name] = value
    return plain


def _hits(net: TokenizerNet, tensors: Mapping[str, np.ndarray]) -> Tensors:
    assert isinstance(net.quantizer, MultiScaleQuantizer)
    return {f"quantize.{HITS_BUFFER}": np.zeros((net.quantizer.levels, net.quantizer.size), np.float32)}


def _check(net: TokenizerNet, params: Mapping[str, Any]) -> None:
    channels = net.quantizer.latent_dim
    require(
        net.z_channels == channels,
        f"VAR's layouts have as many channels in front of the quantizer's convolution as behind it, and this tokenizer "
        f"has {net.z_channels} and {channels}: use no layout, which writes a folder",
    )


def _check_bridged(net: TokenizerNet, params: Mapping[str, Any]) -> None:
    _check(net, params)
    bridge_check("fvq_var", "var")(net, params)


VAR = Layout(
    name="var",
    title="multi-scale tokenizer of VAR",
    convs=VQGAN_CONVS,
    quantizer="multi_scale",
    infer_quantizer=_infer_quantizer,
    marks=(r"encoder\.down\.", r"quantize\.quant_resi\."),
    absent=(r"quantize\.qbridge\.",),
    quantizer_names=rf"quantize\.({BOOK}|{PHI})",
    unread=rf"quantize\.{HITS_BUFFER}",
    attention=False,
    quant_kernels=(3, 1),
    packed=_packed,
    unpacked=_unpacked,
    beside=_hits,
    check=_check,
    facts=lambda net: {"layout": "var", "scales": list(net.quantizer.scales)},
    wrapper="",
)
FVQ_VAR = dataclasses.replace(
    VAR,
    name="fvq_var",
    title="FVQ tokenizer with several scales",
    marks=(*VAR.marks, r"quantize\.qbridge\."),
    absent=(),
    quantizer_names=rf"quantize\.({BOOK}|{PHI}|{BRIDGE})",
    unread=rf"quantize\.({HITS_BUFFER}|{USAGE_BUFFER})",
    bridged=True,
    beside=lambda net, tensors: _hits(net, tensors) | usage(net, tensors),
    check=_check_bridged,
    facts=lambda net: {"layout": "fvq_var", "scales": list(net.quantizer.scales)},
    wrapper="model",
)
