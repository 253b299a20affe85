"""LFQ between VQGAN's networks, as Open-MAGVIT2's code (arXiv 2409.04410) can have it; recognised by its name only.

The quantizer has no tensors, and no convolutions stand beside it: here those are identities. The published
checkpoints of Open-MAGVIT2 have other networks, see `refused`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.evidence import Evidence
from fvq_jax.interop.layouts.layout import Layout, Tensors
from fvq_jax.interop.layouts.taming import TAMING
from fvq_jax.models.quantizers.lfq import LFQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import require

_CONVS = ("quant_conv", "post_quant_conv")


def _infer_quantizer(evidence: Evidence, said: Mapping[str, Any]) -> LFQuantizer:
    return LFQuantizer(bits=evidence.size("encoder.conv_out.weight 0", "encoder.conv_out.bias 0"))


def _packed(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    return {name: value for name, value in tensors.items() if name.partition(".")[0] not in _CONVS}


def _unpacked(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    weight, bias = np.eye(net.z_channels, dtype=np.float32)[:, :, None, None], np.zeros(net.z_channels, np.float32)
    return dict(tensors) | {f"{name}.{leaf}": x for name in _CONVS for leaf, x in (("weight", weight), ("bias", bias))}


def _check(net: TokenizerNet, params: Mapping[str, Any]) -> None:
    def identity(conv: Mapping[str, Any]) -> bool:
        kernel = np.asarray(conv["kernel"])[0, 0]
        return np.array_equal(kernel, np.eye(*kernel.shape)) and not np.any(conv["bias"])

    same = net.z_channels == net.quantizer.latent_dim and all(identity(params[part]["conv"]) for part in _CONVS)
    require(
        same,
        'the layout "lfq" has no convolutions beside its quantizer, and those of this tokenizer do something: '
        "choose no layout, which writes a folder",
    )


LFQ: Layout = dataclasses.replace(
    TAMING,
    name="lfq",
    title="LFQ tokenizer with VQGAN's networks",
    quantizer="lfq",
    infer_quantizer=_infer_quantizer,
    marks=(r"(?!)",),
    quantizer_names=r"(?!)",
    packed=_packed,
    unpacked=_unpacked,
    check=_check,
    facts=lambda net: {"layout": "lfq"},
)
