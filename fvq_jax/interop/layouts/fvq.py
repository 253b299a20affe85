"""FVQ's tokenizers (arXiv 2509.10140): LlamaGen's names, and a bridge in `quantize.qbridge`.

Those with four residual levels have exactly the same tensors, so they are recognised by the name of the layout only.
"""

import dataclasses
from collections.abc import Callable, Mapping
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
from fvq_jax.runtime.errors import InputError, require

PUBLISHED_DEPTH = 4  # a constant of the published program


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


def bridge_check(name: str, folding: str) -> Callable[[TokenizerNet, Mapping[str, Any]], None]:
    """Makes the check that the published programs have a bridge like the network's.

    `name` is the layout, `folding` one that folds the bridge.
    """

    def check(net: TokenizerNet, params: Mapping[str, Any]) -> None:
        quantizer = net.quantizer
        assert isinstance(quantizer, BridgedQuantizer)
        if quantizer.bridge == "mlp5":
            raise InputError(
                f'the layout "{name}" has no names for the bridge mlp5: use layout="{folding}", which folds it'
            )
        if parse_bridge(quantizer.bridge).patch and quantizer.bridge_groups != "2d":
            raise InputError(
                f'the layout "{name}" holds bridges over 2d patches only, and this tokenizer has bridge_groups '
                f'"{quantizer.bridge_groups}": use layout="{folding}", which folds the bridge'
            )

    return check


def _infer_residual(evidence: Evidence, said: Mapping[str, Any]) -> ResidualQuantizer:
    return ResidualQuantizer(**infer_book(evidence, "quantize."), depth=said.get("depth") or PUBLISHED_DEPTH)


def _check_residual(net: TokenizerNet, params: Mapping[str, Any]) -> None:
    assert isinstance(net.quantizer, ResidualQuantizer)
    require(
        net.quantizer.shared_codebook,
        'the layout "fvq_rq" has one codebook for all levels, and these have codes of their own: use layout="rq_vae"',
    )
    bridge_check("fvq_rq", "rq_vae")(net, params)


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
    check=bridge_check("fvq", "llamagen"),
    facts=l2_fact,
)
FVQ_RQ = dataclasses.replace(
    FVQ,
    name="fvq_rq",
    title="FVQ tokenizer with residual levels",
    quantizer="residual",
    infer_quantizer=_infer_residual,
    marks=(r"(?!)",),
    check=_check_residual,
    facts=lambda net: {"layout": "fvq_rq", "depth": net.quantizer.depth},
)
