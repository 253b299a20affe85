"""InceptionV3's features of pictures, with the published FID weights from a local file."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.errors import InputError
from fvq_jax.evals.row_parallel import RowParallel
from fvq_jax.interop.torch_file import read_tensors, require
from fvq_jax.models.inception import InceptionV3

WHERE = (
    "pt_inception-2015-12-05-6726825d.pth (github.com/mseitzer/pytorch-fid, release fid_weights) or "
    "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
)
_EPSILON = 1e-3  # of BatchNorm


def load_inception(path: str | os.PathLike[str]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """InceptionV3 "2015-12-05" as a function of uint8 images [b, H, W, 3], of any size, on all local devices.

    It returns numpy float32: `64`, `192`, `768`, `2048` ([b, that many] features) and `logits_unbiased` [b, 1008], see
    `InceptionV3`. Compiled once for every shape; b should be a multiple of the number of local devices.

    Args:
      path: a .pth or .safetensors file with the names of pytorch-fid and torch-fidelity
        (`Mixed_5b.branch1x1.conv.weight`); of FID's file, not torchvision's.

    Raises:
      InputError: the file is missing, unreadable, or lacks tensors; and from the function, for what is no image batch.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {os.fspath(path)!r}: get {WHERE}")
    run = RowParallel(InceptionV3().apply, {"params": inception_params(read_tensors(path), path)})

    def features(images: np.ndarray) -> dict[str, np.ndarray]:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
            raise InputError(f"images must be uint8 [b, H, W, 3], not {images.dtype} {list(images.shape)}")
        return run(images)

    return features


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
