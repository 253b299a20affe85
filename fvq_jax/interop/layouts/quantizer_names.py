"""Names of a quantizer's tensors in published files, relative to the quantizer, and what they say about it.

A book is `embedding.weight`, a bridge lies in `qbridge`, the convolutions of a multi-scale quantizer in `quant_resi`.
"""

import re
from collections.abc import Sequence
from typing import Any

from fvq_jax.interop.evidence import Evidence
from fvq_jax.models.quantizers.bridge import BridgeSpec, bridge_name
from fvq_jax.models.quantizers.multi_scale import MultiScaleQuantizer
from fvq_jax.runtime.errors import InputError

USAGE_BUFFER = "codebook_used"  # counts of recent codes, kept by the published code among the weights
HITS_BUFFER = "ema_vocab_hit_SV"  # the same of every scale, [scales, codes]

_BRIDGE = {
    "linear0": "linear",
    "compress": "x_embedder.proj",
    "recover": "final_layer.linear",
    "modulation_out": "final_layer.adaLN_modulation.1",
    "class_embedding": "y_embedder.embedding_table",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
_WHOLE = {
    "codebook": "embedding.weight",
    "bridge_net/position_embedding": "qbridge.pos_embed",
    "hits": "embedding.cluster_size",
    "sums": "embedding.embed_avg",
    "layer/kernel": "embedding_proj.weight",
    "layer/bias": "embedding_proj.bias",
}
BOOK, BRIDGE, PHI = r"embedding\.weight", r"qbridge\..*", r"quant_resi\.qresi_ls\.\d+\.(weight|bias)"


def quantizer_name(path: str) -> str:
    """The published name of a parameter or of state of a quantizer, for instance of codebook or phi_0/conv/kernel.

    KeyError if it has none.
    """
    if path in _WHOLE:
        return _WHOLE[path]
    leaf = "bias" if path.endswith("/bias") else "weight"
    if match := re.fullmatch(r"phi_(\d+)/conv/\w+", path):
        return f"quant_resi.qresi_ls.{match[1]}.{leaf}"
    if match := re.fullmatch(r"bridge_net/(?:block(\d+)/)?(\w+?)(?:/\w+)?", path):
        block = f"blocks.{match[1]}." if match[1] else ""
        return f"qbridge.{block}{_BRIDGE[match[2]]}.{leaf}"
    raise KeyError(path)


def infer_book(evidence: Evidence, prefix: str = "") -> dict[str, Any]:
    """The settings `codebook_size`, `code_dim` and `bridge`. InputError if there is no such bridge.

    `prefix` is what stands in front of the quantizer's names in the file.
    """
    book = f"{prefix}embedding.weight"
    beside = ("quant_conv.weight 0", "quant_conv.bias 0") if prefix else ()
    try:
        bridge = bridge_name(_infer_bridge(evidence, f"{prefix}qbridge."))
    except ValueError as error:
        raise InputError(f"{evidence.source} has a bridge that does not exist here: {error}") from None
    return {
        "codebook_size": evidence.size(f"{book} 0"),
        "code_dim": evidence.size(*beside, f"{book} 1"),
        "bridge": bridge,
    }


def infer_scales(evidence: Evidence, given: Sequence[int] | None, prefix: str = "") -> dict[str, Any]:
    """The settings `phi_count` and `scales`.

    Files do not hold scales, but mostly how many there are. Those that are `given` are taken, otherwise the published
    ones for grids of 16 x 16 latents. InputError if there are more or fewer of them.
    """
    scales = MultiScaleQuantizer.scales if given is None else tuple(given)
    rows = evidence.sizes(f"{prefix}{HITS_BUFFER} 0")
    if rows and rows[0] != len(scales):
        said = f"{' '.join(map(str, scales))} are {len(scales)}"
        raise InputError(
            f"{evidence.source} has {rows[0]} scales, and {said}: give scales=(...), the sides of its grids of codes"
        )
    return {"phi_count": evidence.count(rf"{re.escape(prefix)}quant_resi\.qresi_ls\.(\d+)\."), "scales": scales}


def _infer_bridge(evidence: Evidence, prefix: str) -> BridgeSpec:
    if not evidence.any(prefix):
        return BridgeSpec("none")
    if evidence.any(f"{prefix}linear."):
        return BridgeSpec("linear")
    compress = f"{prefix}x_embedder.proj"
    width = evidence.size(f"{compress}.weight 0", f"{compress}.bias 0", f"{prefix}blocks.0.attn.proj.bias 0")
    patch, across = (evidence.size(f"{compress}.weight {axis}") for axis in (2, 3))
    if patch != across:
        raise ValueError(f"its patches of {patch} x {across} codes are not square")
    kind, classes = "vit", 0
    if evidence.any(f"{prefix}y_embedder."):
        # One row without classes; otherwise a row per class and a last one for no class, which all published bridges
        # with classes have, since all of them drop classes in training.
        kind, classes = "dit", evidence.size(f"{prefix}y_embedder.embedding_table.weight 0") - 1
    return BridgeSpec(kind, width, patch, evidence.count(rf"{re.escape(prefix)}blocks\.(\d+)\."), classes)


def usage_buffer(size: int, bridged: bool) -> int:
    """How many codes the usage buffer of the published quantizer holds, which a strict load compares.

    LlamaGen's holds 65,536; that of FVQ, which has a bridge, does so up to 65,535 codes, and then one more than codes.
    """
    return size + 1 if bridged and size >= 65536 else 65536
