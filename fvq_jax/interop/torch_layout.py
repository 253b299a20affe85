"""Names and shapes of tokenizer weights in the published PyTorch layout, and the way from there to ours.

PyTorch keeps convolutions as OIHW and linear layers as [out, in]; here they are HWIO and [in, out].
"""

import re

import numpy as np

_RES = {"norm1": "norm1/norm", "norm2": "norm2/norm", "conv1": "conv1/conv", "conv2": "conv2/conv"}
_RES["nin_shortcut"] = "shortcut/conv"
_ATTENTION = {"norm": "norm/norm", "q": "q/conv", "k": "k/conv", "v": "v/conv", "proj_out": "out/conv"}
_BRIDGE = {"attn.qkv": "qkv", "attn.proj": "out", "mlp.fc1": "mlp_in", "mlp.fc2": "mlp_out"}


def parameter_path(module: str, levels: int) -> str:
    """Where the parameters of a PyTorch module live in `TokenizerNet`, as a path; KeyError if it is none of its.

    `levels` is the number of resolutions: the published decoder counts its levels from the lowest.
    """
    if match := re.fullmatch(r"(encoder|decoder)\.(.+)", module):
        part, rest = match.groups()
        if rest in ("conv_in", "conv_out", "norm_out"):
            return f"{part}/{rest}/{'norm' if rest == 'norm_out' else 'conv'}"
        if match := re.fullmatch(r"mid\.([012])\.(\w+)", rest):
            block = {"0": "mid_res0", "1": "mid_attention", "2": "mid_res1"}[match[1]]
            return f"{part}/{block}/{(_ATTENTION if match[1] == '1' else _RES)[match[2]]}"
        if match := re.fullmatch(r"conv_blocks\.(\d+)\.(.+)", rest):
            level = int(match[1]) if part == "encoder" else levels - 1 - int(match[1])
            name = match[2]
            if name in ("downsample.conv", "upsample.conv"):
                return f"{part}/level{level}_{name.split('.')[0]}/conv/conv"
            if match := re.fullmatch(r"res\.(\d+)\.(\w+)", name):
                return f"{part}/level{level}_res{match[1]}/{_RES[match[2]]}"
            if match := re.fullmatch(r"attn\.(\d+)\.(\w+)", name):
                return f"{part}/level{level}_attention{match[1]}/{_ATTENTION[match[2]]}"
    if module in ("quant_conv", "post_quant_conv"):
        return f"{module}/conv"
    if module == "quantize.embedding":
        return "quantizer/codebook"
    if match := re.fullmatch(r"quantize\.qbridge\.(.+)", module):
        name = match[1]
        if name == "linear":
            return "quantizer/bridge_net/linear0"
        if name == "x_embedder.proj":
            return "quantizer/bridge_net/compress"
        if name == "final_layer.linear":
            return "quantizer/bridge_net/recover"
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            return f"quantizer/bridge_net/block{match[1]}/{_BRIDGE[match[2]]}"
    raise KeyError(module)


def tokenizer_params(tensors: dict[str, np.ndarray]) -> dict:
    """Parameters of `TokenizerNet` from the tensors of a published checkpoint (FVQ or LlamaGen layout).

    `quantize.codebook_used`, a usage buffer, is left out. KeyError for a tensor that belongs to neither layout.
    """
    levels = 1 + max(int(k.split(".")[2]) for k in tensors if k.startswith("encoder.conv_blocks."))
    params: dict = {}
    for key, value in tensors.items():
        if key == "quantize.codebook_used":
            continue
        module, kind = key.rsplit(".", 1)
        *parents, last = parameter_path(module, levels).split("/")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        if module == "quantize.embedding":
            node[last] = value
        else:
            node.setdefault(last, {}).update(_leaf(kind, value, is_compress=last == "compress"))
    return params


def _leaf(kind: str, value: np.ndarray, is_compress: bool) -> dict[str, np.ndarray]:
    if kind == "bias":
        return {"bias": value}
    if value.ndim == 1:
        return {"scale": value}
    if value.ndim == 2:
        return {"kernel": value.T}
    kernel = value.transpose(2, 3, 1, 0)
    # The published bridge compresses with a convolution whose stride is its size: a linear layer on patches.
    return {"kernel": kernel.reshape(-1, kernel.shape[-1]) if is_compress else kernel}
