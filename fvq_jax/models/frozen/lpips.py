"""LPIPS, the perceptual distance of the recipe: features of VGG16, compared under learned channel weights.

For evaluation, AlexNet can take the place of VGG16, since many papers report that variant.

Pure functions of a frozen parameter dictionary rather than a Flax module: nothing in it is trained, so it must stay
out of the train state. Pass the dictionary to a jitted step as an argument; closed over, its 59 MB would become a
constant of the program. Source: arXiv 1801.03924, version 0.1 of its weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Convolutions of VGG16 (arXiv 1409.1556) by torchvision's index, in the five stages between its poolings.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The convolutions of an image classifier, in the stages after which features are compared.

    Attributes:
      name: as torchvision calls it.
      stages: for each stage its convolutions: (torchvision's index, channels, window, stride, padding).
      pooling: side of the window of the max poolings, whose stride is 2.
      pooled: the stages that begin with a max pooling.
      least: the smallest side of an image, in pixels.
      weights: which file holds the classifier.
      heads_file: the name of the file with the channel weights, which the package lpips brings too.
    """

    name: str
    stages: tuple[tuple[tuple[int, int, int, int, int], ...], ...]
    pooling: int
    pooled: tuple[int, ...]
    least: int
    weights: str
    heads_file: str

    @property
    def heads(self) -> str:
        """Which file holds the channel weights."""
        return (
            f"the LPIPS v0.1 heads for {self.name} ({self.heads_file} in lpips/weights/v0.1 of "
            "github.com/richzhang/PerceptualSimilarity; those of the installed package lpips are found: "
            "pip install --no-deps lpips)"
        )


def _three_by_three(width: int, *indices: int) -> tuple[tuple[int, int, int, int, int], ...]:
    return tuple((index, width, 3, 1, 1) for index in indices)


VGG16 = Backbone(
    "VGG16",
    tuple(_three_by_three(width, *indices) for width, indices in zip(WIDTHS, STAGES, strict=True)),
    pooling=2,
    pooled=(1, 2, 3, 4),
    least=16,
    weights="torchvision's VGG16 weights (download.pytorch.org/models/vgg16-397923af.pth)",
    heads_file="vgg.pth",
)
ALEXNET = Backbone(
    "AlexNet",  # arXiv 1404.5997
    (
        ((0, 64, 11, 4, 2),),
        ((3, 192, 5, 1, 2),),
        _three_by_three(384, 6),
        _three_by_three(256, 8),
        _three_by_three(256, 10),
    ),
    pooling=3,
    pooled=(1, 2),
    least=31,
    weights="torchvision's AlexNet weights (download.pytorch.org/models/alexnet-owt-7be5be79.pth)",
    heads_file="alex.pth",
)
# From [-1, 1] to the ImageNet statistics that both expect, as published with LPIPS.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10


def lpips_distance(
    params: Mapping[str, Any],
    a: Float[Array, "b H W 3"],
    b: Float[Array, "b H W 3"],
    *,
    dtype: DTypeLike = jnp.float32,
    backbone: Backbone = VGG16,
) -> Float[Array, "b"]:
    """Perceptual distance of each pair of images in [-1, 1]; float32, 0 for equal images.

    Features of both images after each of the five stages are scaled to unit length per pixel; their squared
    difference, weighted per channel, is averaged over pixels and summed over stages. `params` must belong to
    `backbone`, which runs in `dtype`; everything after it is float32 (float32 means full precision on every device).
    Gradients reach the images, never `params`, and are finite where all channels of a pixel are 0. ValueError for
    images under 16 pixels (AlexNet: 31).
    """
    if min(a.shape[1:3]) < backbone.least:
        raise ValueError(f"LPIPS needs images of at least {backbone.least} pixels, got {a.shape[1]}x{a.shape[2]}")
    params = jax.lax.stop_gradient(params)
    distance = jnp.zeros(a.shape[0], jnp.float32)
    features = zip(*(_features(params, images, backbone, dtype) for images in (a, b)), strict=True)
    for stage, (features_a, features_b) in enumerate(features):
        difference = jnp.square(_unit_length(features_a) - _unit_length(features_b))
        weighted = jnp.sum(difference * params[f"lin_{stage}"][None, None, None], axis=-1)
        distance += jnp.mean(weighted, axis=(1, 2))
    return distance


def lpips_shapes(backbone: Backbone = VGG16) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, for reading weight files and for compiling without the files.

    `features_N`: kernel [w, w, in, out] and bias [out] of convolution N; `lin_S`: channel weights [c] of stage S.
    """
    shapes: dict[str, Any] = {}
    channels = 3
    for stage, convolutions in enumerate(backbone.stages):
        for index, width, window, _, _ in convolutions:
            shapes[f"features_{index}"] = {
                "kernel": jax.ShapeDtypeStruct((window, window, channels, width), jnp.float32),
                "bias": jax.ShapeDtypeStruct((width,), jnp.float32),
            }
            channels = width
        shapes[f"lin_{stage}"] = jax.ShapeDtypeStruct((channels,), jnp.float32)
    return shapes


def _features(
    params: Mapping[str, Any], images: Float[Array, "b H W 3"], backbone: Backbone, dtype: DTypeLike
) -> list[Float[Array, "b _ _ _"]]:
    """Activations after the last ReLU of each stage, in `dtype`."""
    # A TPU multiplies float32 in bfloat16 unless told otherwise; a caller that wants bfloat16 says so by `dtype`.
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    x = ((images - SHIFT[None, None, None]) / SCALE[None, None, None]).astype(dtype)
    features = []
    for stage, convolutions in enumerate(backbone.stages):
        if stage in backbone.pooled:
            x = nn.max_pool(x, (backbone.pooling, backbone.pooling), strides=(2, 2))
        for index, _, _, stride, padding in convolutions:
            layer = params[f"features_{index}"]
            x = jax.lax.conv_general_dilated(
                x,
                layer["kernel"].astype(dtype),
                window_strides=(stride, stride),
                padding=[(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
            x = jax.nn.relu(x + layer["bias"].astype(dtype)[None, None, None])
        features.append(x)
    return features


def _unit_length(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each pixel's channels divided by their length, in float32; a pixel of zeros stays zero, with gradient zero."""
    features = features.astype(jnp.float32)
    squared = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # sqrt has an infinite slope at 0, where ReLU puts whole pixels; the inner `where` keeps NaN out of the gradient.
    length = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    return features / (length + EPSILON)
