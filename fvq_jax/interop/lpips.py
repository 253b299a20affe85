"""The weights of LPIPS, from torchvision's files of the backbone and the published files of the heads."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from fvq_jax.interop.torch_file import read_tensors, require
from fvq_jax.models.frozen.lpips import VGG16, Backbone, lpips_shapes
from fvq_jax.runtime.errors import InputError


def load_lpips(vgg16_path: str | os.PathLike[str] | None, lpips_path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Parameters of `lpips_distance`, numpy float32, from local .pth or .safetensors files.

    `vgg16_path`: torchvision's VGG16 (`features.N.*`; the classifier is ignored). `lpips_path`: the heads of LPIPS
    (`linS.model.1.weight`), or a file with both (taming-transformers' `vgg_lpips.pth`: `net.sliceS.N.*` too), in which
    case `vgg16_path` may be empty. Without it the heads are those of the installed package. InputError if a file is
    missing (says what to get and which config field to set), unreadable, or lacks tensors.
    """
    lpips_path = lpips_path or installed_heads(VGG16)
    if not lpips_path or not os.path.isfile(lpips_path):
        raise InputError(
            f"loss.lpips_path={_shown(lpips_path)} is no file: get {VGG16.heads} and set loss.lpips_path to it"
        )
    tensors = read_tensors(lpips_path)
    vgg16_source = lpips_path
    if not any(key.startswith("net.slice") for key in tensors):
        if not vgg16_path or not os.path.isfile(vgg16_path):
            raise InputError(
                f"loss.vgg16_path={_shown(vgg16_path)} is no file: get {VGG16.weights} and set loss.vgg16_path to it"
            )
        tensors |= read_tensors(vgg16_path)
        vgg16_source = vgg16_path
    return lpips_params(tensors, VGG16, vgg16_source, lpips_path)


def installed_heads(backbone: Backbone) -> Path | None:
    """The file of heads that the installed package `lpips` has for a backbone; None if there is none.

    The package is not imported: it needs PyTorch and torchvision.
    """
    try:
        spec = importlib.util.find_spec("lpips")
    except ValueError:  # what is loaded under this name is no package
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "weights", "v0.1", backbone.heads_file)
        if path.is_file():
            logging.info("LPIPS: no file of heads was given, so those of the installed package are used: %s", path)
            return path
    return None


def lpips_params(
    tensors: Mapping[str, np.ndarray], backbone: Backbone, backbone_source: Any, heads_source: Any
) -> dict[str, Any]:
    """Parameters of `lpips_distance` from the published tensors of both files; InputError names a wrong file."""
    combined = "net.slice1.0.weight" in tensors
    heads = {f"lin_{stage}": f"lin{stage}.model.1.weight" for stage in range(len(backbone.stages))}
    convolutions = {
        f"features_{index}": f"net.slice{stage + 1}.{index}" if combined else f"features.{index}"
        for stage, convolutions in enumerate(backbone.stages)
        for index, *_ in convolutions
    }
    require(tensors, heads.values(), heads_source)
    require(tensors, [f"{key}.{leaf}" for key in convolutions.values() for leaf in ("weight", "bias")], backbone_source)

    params: dict[str, Any] = {
        name: {
            "kernel": tensors[f"{key}.weight"].transpose(2, 3, 1, 0),
            "bias": tensors[f"{key}.bias"],
        }
        for name, key in convolutions.items()
    }
    params |= {name: tensors[key].reshape(-1) for name, key in heads.items()}
    params = jax.tree.map(lambda x: np.ascontiguousarray(x, np.float32), params)
    for (path, expected), actual in zip(
        jax.tree.leaves_with_path(lpips_shapes(backbone)), jax.tree.leaves(params), strict=True
    ):
        if actual.shape != expected.shape:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(
                f"{backbone_source} or {heads_source} is not for {backbone.name}: "
                f"{name} has shape {actual.shape}, needs {expected.shape}"
            )
    return params


def _shown(path: str | os.PathLike[str] | None) -> str:
    return repr(os.fspath(path)) if path else "(not set)"
