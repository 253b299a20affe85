"""The weights of FID's InceptionV3, from the published file, with every BatchNorm folded away."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.interop.torch_file import require
from fvq_jax.models.frozen.inception import InceptionV3
from fvq_jax.runtime.errors import InputError

WHERE = (
    "pt_inception-2015-12-05-6726825d.pth (github.com/mseitzer/pytorch-fid, release fid_weights) or "
    "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
)
_EPSILON = 1e-3  # of BatchNorm


def inception_params(tensors: Mapping[str, np.ndarray], source: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters of `InceptionV3`, numpy float32, with every BatchNorm folded into its convolution.

    `tensors` are those of the published file; more than needed is fine. InputError, naming `source`, if one is missing
    or has another shape.
    """
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.uint8))
    shapes = shapes["params"]
    convolutions = [name for name in shapes if name != "fc"]
    leaves = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    require(tensors, ["fc.weight", *(f"{name}.{leaf}" for name in convolutions for leaf in leaves)], source)
    params = {"fc": {"kernel": np.ascontiguousarray(tensors["fc.weight"].T, np.float32)}}
    for name in convolutions:
        kernel, gamma, beta, mean, variance = (tensors[f"{name}.{leaf}"].astype(np.float64) for leaf in leaves)
        scale = gamma / np.sqrt(variance + _EPSILON)
        params[name] = {
            "kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0) * scale, np.float32),
            "bias": (beta - mean * scale).astype(np.float32),
        }
    for path, expected in jax.tree.leaves_with_path(shapes):
        name, leaf = (key.key for key in path)
        if params[name][leaf].shape != expected.shape:
            raise InputError(
                f"{source} is not FID's InceptionV3 of 2015-12-05: {name} has a {leaf} of shape "
                f"{params[name][leaf].shape}, needs {expected.shape}"
            )
    return params
