"""Tokenizer weights in the published PyTorch layout: names, shapes, and the arrays both ways.

Both layouts are one scheme: FVQ's is LlamaGen's plus the bridge (`quantize.qbridge.*`). PyTorch keeps convolutions as
OIHW and linear layers as [out, in]; here they are HWIO and [in, out]. `infer` finds out which
network a file's tensors belong to; `tokenizer_checkpoint` reads and writes files.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.infer import infer_network
from fvq_jax.interop.named_tensors import abstract_params, check_tensors
from fvq_jax.models.quantizers.bridge import parse_bridge
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import flatten, nest

USAGE_BUFFER = "quantize.codebook_used"  # counts of recent codes, kept by the published code among the weights

_MID = {"mid_res0": "mid.0", "mid_attention": "mid.1", "mid_res1": "mid.2"}
_LAYER = {"shortcut": "nin_shortcut", "out": "proj_out"}
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


def torch_name(path: str, levels: int) -> str:
    """The published name of the parameter at `path` of `TokenizerNet`, for instance encoder/conv_in/conv/kernel.

    `levels` is the number of resolutions: the published decoder counts its levels from the lowest. KeyError if the
    layout has no name for it.
    """
    part, *middle, leaf = path.split("/")
    leaf = "bias" if leaf == "bias" else "weight"
    if part in ("encoder", "decoder"):
        block, *layer = middle[:-1]  # the last name is the Flax layer inside ours
        if match := re.fullmatch(r"level(\d+)_([a-z]+?)(\d*)", block):
            level = int(match[1]) if part == "encoder" else levels - 1 - int(match[1])
            kind = {"attention": "attn"}.get(match[2], match[2])
            block = ".".join(filter(None, ("conv_blocks", str(level), kind, match[3])))
        return ".".join((part, _MID.get(block, block), *(_LAYER.get(name, name) for name in layer), leaf))
    if part in ("quant_conv", "post_quant_conv"):
        return f"{part}.{leaf}"
    if path == "quantizer/codebook":
        return "quantize.embedding.weight"
    if path == "quantizer/bridge_net/position_embedding":
        return "quantize.qbridge.pos_embed"
    if match := re.fullmatch(r"quantizer/bridge_net/(?:block(\d+)/)?(\w+?)(?:/\w+)?", path):
        block = f"blocks.{match[1]}." if match[1] else ""
        return f"quantize.qbridge.{block}{_BRIDGE[match[2]]}.{leaf}"
    raise KeyError(path)


def check_layout(net: TokenizerNet) -> None:
    """Raises InputError if the published layout cannot hold `net` with its bridge."""
    quantizer = _vector_quantizer(net)
    spec = parse_bridge(quantizer.bridge)
    if spec.kind == "mlp5":
        raise InputError('the layout "fvq" has no names for the bridge mlp5: use layout="llamagen", which folds it')
    if spec.patch and quantizer.bridge_groups != "2d":
        raise InputError(
            f'the layout "fvq" holds bridges over 2d patches only, and this tokenizer has bridge_groups '
            f'"{quantizer.bridge_groups}": use layout="llamagen", which folds the bridge'
        )


def _vector_quantizer(net: TokenizerNet) -> VectorQuantizer:
    if not isinstance(net.quantizer, VectorQuantizer):
        raise InputError("the published layouts hold vector quantizers only: save it without a layout, as a folder")
    return net.quantizer


def torch_tensors(net: TokenizerNet, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of `net` by published name, without the usage buffer. InputError as for `check_layout`."""
    check_layout(net)
    levels = len(net.ch_mult)
    tensors = {}
    for name, value in flatten(params).items():
        tensors[torch_name(name, levels)] = _to_torch(name, np.asarray(value), net.quantizer.latent_dim)
    return tensors


def usage_buffer_size(net: TokenizerNet) -> int:
    """How many codes the usage buffer of the published quantizer holds, which a strict load compares.

    LlamaGen's holds 65,536; that of FVQ, which has a bridge, does so up to 65,535 codes, and then one more than codes.
    """
    quantizer = _vector_quantizer(net)
    return quantizer.size + 1 if quantizer.foldable and quantizer.size >= 65536 else 65536


def tokenizer_params(
    tensors: Mapping[str, np.ndarray],
    net: TokenizerNet | None = None,
    source: str = "the checkpoint",
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Parameters of `net` (None: the network that `infer_network` finds for the tensors), float32.

    The usage buffer is left out. All or nothing: InputError that lists every tensor that is missing, extra or of
    another shape (the first ten names and a count), naming `source`. `track` wraps the names, for a progress bar.
    """
    net = infer_network(tensors, source) if net is None else net
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_params(net)).items()}
    names = {torch_name(name, len(net.ch_mult)): name for name in shapes}
    weights = {key: value for key, value in tensors.items() if key != USAGE_BUFFER}
    check_tensors(weights, {key: _torch_shape(name, shapes[name], net) for key, name in names.items()}, source)
    params = {}
    for key in track(names):
        value = _from_torch(names[key], weights[key], shapes[names[key]])
        params[names[key]] = np.ascontiguousarray(value, np.float32)
    return nest(params)


def _to_torch(name: str, value: np.ndarray, code_dim: int) -> np.ndarray:
    if name.endswith("compress/kernel"):
        # The published bridge compresses with a convolution whose stride is its size: a linear layer on patches.
        patch = math.isqrt(value.shape[0] // code_dim)
        value = value.reshape(patch, patch, code_dim, -1)
    if name.endswith("/kernel"):
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    if name.endswith("/position_embedding"):
        value = value[None]
    return value


def _from_torch(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("/kernel"):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value.reshape(shape)


def _torch_shape(name: str, shape: tuple[int, ...], net: TokenizerNet) -> tuple[int, ...]:
    return _to_torch(name, np.broadcast_to(np.float32(0), shape), net.quantizer.latent_dim).shape
