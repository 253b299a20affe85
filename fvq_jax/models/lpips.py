"""LPIPS, the perceptual distance of the recipe: VGG16 features, compared under learned channel weights.

Pure functions of a frozen parameter dictionary rather than a Flax module: nothing in it is trained, so it must stay
out of the train state. Pass the dictionary to a jitted step as an argument; closed over, its 59 MB would become a
constant of the program. Source: arXiv 1801.03924, version 0.1 of its weights.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fvq_jax.errors import InputError
from fvq_jax.interop.torch_file import read_tensors, require

# Convolutions of VGG16 (arXiv 1409.1556) by torchvision's index, in the five stages between its poolings.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
# From [-1, 1] to the ImageNet statistics that VGG16 expects, as published with LPIPS.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10


def lpips_distance(
    params: Mapping[str, Any],
    a: Float[Array, "b H W 3"],
    b: Float[Array, "b H W 3"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b"]:
    """Perceptual distance of each pair of images in [-1, 1]; float32, 0 for equal images.

    Features of both images after each of the five stages are scaled to unit length per pixel; their squared
    difference, weighted per channel, is averaged over pixels and summed over stages. VGG16 runs in `dtype`, all
    after it in float32 (float32 means full precision on every device). Gradients reach the images, never `params`,
    and are finite where all channels of a pixel are 0. ValueError for images under 16 pixels.
    """
    if min(a.shape[1:3]) < 16:
        raise ValueError(f"LPIPS needs images of at least 16 pixels, got {a.shape[1]}x{a.shape[2]}")
    params = jax.lax.stop_gradient(params)
    distance = jnp.zeros(a.shape[0], jnp.float32)
    features = zip(_vgg16_features(params, a, dtype), _vgg16_features(params, b, dtype), strict=True)
    for stage, (features_a, features_b) in enumerate(features):
        difference = jnp.square(_unit_length(features_a) - _unit_length(features_b))
        weighted = jnp.sum(difference * params[f"lin_{stage}"][None, None, None], axis=-1)
        distance += jnp.mean(weighted, axis=(1, 2))
    return distance


def lpips_shapes() -> dict[str, Any]:
    """Shapes and dtypes of the parameters, for `load_lpips` and for compiling without the files.

    `features_N`: kernel [3, 3, in, out] and bias [out] of convolution N; `lin_S`: channel weights [c] of stage S.
    """
    shapes: dict[str, Any] = {}
    channels = 3
    for stage, width in enumerate(WIDTHS):
        for index in STAGES[stage]:
            shapes[f"features_{index}"] = {
                "kernel": jax.ShapeDtypeStruct((3, 3, channels, width), jnp.float32),
                "bias": jax.ShapeDtypeStruct((width,), jnp.float32),
            }
            channels = width
        shapes[f"lin_{stage}"] = jax.ShapeDtypeStruct((width,), jnp.float32)
    return shapes


def load_lpips(vgg16_path: str | os.PathLike[str] | None, lpips_path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Parameters of `lpips_distance`, numpy float32, from local .pth or .safetensors files.

    `vgg16_path`: torchvision's VGG16 (`features.N.*`; the classifier is ignored). `lpips_path`: the heads of LPIPS
    (`linS.model.1.weight`), or a file with both (taming-transformers' `vgg_lpips.pth`: `net.sliceS.N.*` too), in which
    case `vgg16_path` may be empty. InputError if a file is missing (says what to get and which config field to set),
    unreadable, or lacks tensors.
    """
    if not lpips_path or not os.path.isfile(lpips_path):
        raise InputError(
            f"loss.lpips_path={_shown(lpips_path)} is no file: get the LPIPS v0.1 heads for VGG16 (vgg.pth in "
            "lpips/weights/v0.1 of github.com/richzhang/PerceptualSimilarity) and set loss.lpips_path to it"
        )
    tensors = read_tensors(lpips_path)
    vgg16_source = lpips_path
    if not any(key.startswith("net.slice") for key in tensors):
        if not vgg16_path or not os.path.isfile(vgg16_path):
            raise InputError(
                f"loss.vgg16_path={_shown(vgg16_path)} is no file: get torchvision's VGG16 weights "
                "(download.pytorch.org/models/vgg16-397923af.pth) and set loss.vgg16_path to it"
            )
        tensors |= read_tensors(vgg16_path)
        vgg16_source = vgg16_path
    return _params_from_torch(tensors, vgg16_source, lpips_path)


def _params_from_torch(tensors: Mapping[str, np.ndarray], vgg16_source: Any, lpips_source: Any) -> dict[str, Any]:
    combined = "net.slice1.0.weight" in tensors
    heads = {f"lin_{stage}": f"lin{stage}.model.1.weight" for stage in range(len(STAGES))}
    convolutions = {
        f"features_{index}": f"net.slice{stage + 1}.{index}" if combined else f"features.{index}"
        for stage, indices in enumerate(STAGES)
        for index in indices
    }
    require(tensors, heads.values(), lpips_source)
    require(tensors, [f"{key}.{leaf}" for key in convolutions.values() for leaf in ("weight", "bias")], vgg16_source)

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
        jax.tree.leaves_with_path(lpips_shapes()), jax.tree.leaves(params), strict=True
    ):
        if actual.shape != expected.shape:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(
                f"{vgg16_source} or {lpips_source} is not for VGG16: "
                f"{name} has shape {actual.shape}, needs {expected.shape}"
            )
    return params


def _vgg16_features(
    params: Mapping[str, Any], images: Float[Array, "b H W 3"], dtype: DTypeLike
) -> list[Float[Array, "b _ _ _"]]:
    """Activations after the last ReLU of each stage, before its pooling, in `dtype`."""
    # A TPU multiplies float32 in bfloat16 unless told otherwise; whoever wants that asks for bfloat16.
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    x = ((images - SHIFT[None, None, None]) / SCALE[None, None, None]).astype(dtype)
    features = []
    for indices in STAGES:
        x = nn.max_pool(x, (2, 2), strides=(2, 2)) if features else x
        for index in indices:
            layer = params[f"features_{index}"]
            x = jax.lax.conv_general_dilated(
                x,
                layer["kernel"].astype(dtype),
                window_strides=(1, 1),
                padding="SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
            x = jax.nn.relu(x + layer["bias"].astype(dtype)[None, None, None])
        features.append(x)
    return features


def _unit_length(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each pixel's channels over their length, in float32; a pixel of zeros stays zero, with gradient zero."""
    features = features.astype(jnp.float32)
    squared = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # sqrt has an infinite slope at 0, where ReLU puts whole pixels; the inner `where` keeps NaN out of the gradient.
    length = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    return features / (length + EPSILON)


def _shown(path: str | os.PathLike[str] | None) -> str:
    return repr(os.fspath(path)) if path else "(not set)"
