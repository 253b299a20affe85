"""FVQ's tokenizers (arXiv 2509.10140): LlamaGen's names, and a bridge in `quantize.qbridge`.

Those with four residual levels have exactly the same tensors, so they are recognised by the name of the layout only.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.evidence import Evidence
from fvq_jax.interop.layouts.conv_names import LLAMAGEN_CONVS
from fvq_jax.interop.layouts.layout import Layout, Tensors
from fvq_jax.interop.layouts.quantizer_names import BOOK, BRIDGE, USAGE_BUFFER, infer_book, usage_buffer
from fvq_jax.models.quantizers.bridge import parse_bridge
from fvq_jax.models.quantizers.bridged import BridgedQuantizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError

PUBLISHED_DEPTH = 4  # a constant of the published program
_FOLD = "use a layout that folds the bridge, such as llamagen, or none, which writes a folder"


def infer_vector(evidence: Evidence, said: Mapping[str, Any]) -> VectorQuantizer:
    """A vector quantizer, whose codes have unit length if that was said."""
    return VectorQuantizer(**infer_book(evidence, "quantize."), l2_normalize=bool(said.get("l2_norm")))


def l2_fact(net: TokenizerNet) -> dict[str, Any]:
    """Whether codes have unit length, as the published programs call it."""
    return {"codebook_l2_norm": net.quantizer.l2_normalize}


def usage(net: TokenizerNet, tensors: Mapping[str, np.ndarray]) -> Tensors:
    """An empty buffer of recent codes, of the size that a strict load wants."""
    size = usage_buffer(net.quantizer.size, net.quantizer.foldable)
    return {f"quantize.{USAGE_BUFFER}": np.zeros(size, np.float32)}


def check_bridge(net: TokenizerNet, params: Mapping[str, Any]) -> None:
    """InputError unless the published programs have a bridge like this one."""
    quantizer = net.quantizer
    assert isinstance(quantizer, BridgedQuantizer)
    if quantizer.bridge == "mlp5":
        raise InputError(f"FVQ's layouts have no names for the bridge mlp5: {_FOLD}")
    if parse_bridge(quantizer.bridge).patch and quantizer.bridge_groups != "2d":
        raise InputError(
            "FVQ's layouts hold bridges over 2d patches only, and this tokenizer has bridge_groups "
            f'"{quantizer.bridge_groups}": {_FOLD}'
        )


def _infer_residual(evidence: Evidence, said: Mapping[str, Any]) -> ResidualQuantizer:
    return ResidualQuantizer(**infer_book(evidence, "quantize."), depth=said.get("depth") or PUBLISHED_DEPTH)


FVQ = Layout(
    name="fvq",
    title="FVQ tokenizer",
    convs=LLAMAGEN_CONVS,
    quantizer="vector",
    infer_quantizer=infer_vector,
    marks=(r"encoder\.conv_blocks\.", r"quantize\.qbridge\."),
    quantizer_names=rf"quantize\.({BOOK}|{BRIDGE})",
    unread=rf"quantize\.{USAGE_BUFFER}",
    bridged=True,
    attention=False,
    beside=usage,
    check=check_bridge,
    facts=l2_fact,
)
FVQ_RQ = dataclasses.replace(
    FVQ,
    name="fvq_rq",
    title="FVQ tokenizer with residual levels",
    quantizer="residual",
    infer_quantizer=_infer_residual,
    marks=(r"(?!)",),
    facts=lambda net: {"layout": "fvq_rq", "depth": net.quantizer.depth},
)
