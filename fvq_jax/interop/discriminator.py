"""Maps the tensors of published discriminators to the variables of `fvq_jax.models`.

Reading them from a file is `fvq_jax.interop.torch_file.read_tensors`; strip prefixes such as `discriminator.` first.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.torch_file import require
from fvq_jax.runtime.errors import InputError


def patchgan_from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables `{"params", "batch_stats"}` of `PatchGAN`, float32, from keys `main.N.*`.

    The number of layers follows from the keys. InputError if tensors are missing.
    """
    n_layers = sum(key.endswith(".running_mean") for key in tensors)
    if not n_layers:
        raise InputError("the PatchGAN discriminator lacks main.3.running_mean: it has no BatchNorm layer")
    names = {"conv_0": "main.0", "conv_out": f"main.{3 * n_layers + 2}"}
    names |= {f"conv_{i}": f"main.{3 * i - 1}" for i in range(1, n_layers + 1)}
    norms = {f"norm_{i}": f"main.{3 * i}" for i in range(1, n_layers + 1)}
    biased = ("conv_0", "conv_out")
    keys = [f"{key}.weight" for key in names.values()] + [f"{names[name]}.bias" for name in biased]
    keys += [f"{k}.{part}" for k in norms.values() for part in ("weight", "bias", "running_mean", "running_var")]
    require(tensors, keys, "the PatchGAN discriminator")

    params = {name: {"kernel": _kernel(tensors[f"{key}.weight"])} for name, key in names.items()}
    for name in biased:
        params[name]["bias"] = _float32(tensors[f"{names[name]}.bias"])
    for name, key in norms.items():
        params[name] = {"scale": _float32(tensors[f"{key}.weight"]), "bias": _float32(tensors[f"{key}.bias"])}
    batch_stats = {
        name: {
            "mean": _float32(tensors[f"{key}.running_mean"]),
            "var": _float32(tensors[f"{key}.running_var"]),
        }
        for name, key in norms.items()
    }
    return {"params": params, "batch_stats": batch_stats}


def stylegan_from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables `{"params"}` of `StyleGANDiscriminator`, float32, from keys `blocks.N.*`, `final_*`.

    The number of blocks follows from the keys. InputError if tensors are missing.
    """
    n_blocks = sum(key.endswith(".conv_res.weight") for key in tensors)
    layers: dict[tuple[str, ...], str] = {("conv_in",): "blocks.0", ("conv_out",): "final_conv.0"}
    layers |= {("dense_0",): "final_linear.0", ("dense_1",): "final_linear.2"}
    parts = {"shortcut": "conv_res", "conv_0": "net.0", "conv_1": "net.2", "downsample": "downsample.1"}
    for i in range(n_blocks):  # blocks.1 is an activation
        layers |= {(f"block_{i}", part): f"blocks.{i + 2}.{key}" for part, key in parts.items()}
    require(
        tensors,
        [f"{key}.{leaf}" for key in layers.values() for leaf in ("weight", "bias")],
        "the StyleGAN discriminator",
    )

    params: dict[str, Any] = {}
    for (*outer, name), key in layers.items():
        weight = tensors[f"{key}.weight"]
        if name == "dense_0":  # its inputs are a flattened [c, 4, 4] there, a flattened [4, 4, c] here
            weight = weight.reshape(len(weight), -1, 4, 4).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        parent = params.setdefault(outer[0], {}) if outer else params
        parent[name] = {"kernel": _kernel(weight), "bias": _float32(tensors[f"{key}.bias"])}
    return {"params": params}


def _kernel(weight: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, or [out, in] to [in, out]."""
    return _float32(weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T)


def _float32(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)
