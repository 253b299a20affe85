"""InceptionV3's features of pictures, with the published FID weights from a local file."""

import os
from collections.abc import Callable

import numpy as np

from fvq_jax.interop.inception import WHERE, inception_params
from fvq_jax.interop.torch_file import read_tensors
from fvq_jax.models.frozen.inception import InceptionV3
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.row_parallel import RowParallel


def load_inception(
    path: str | os.PathLike[str], *, spatial: bool = False
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """InceptionV3 "2015-12-05" as a function of uint8 images [b, H, W, 3], of any size, on all local devices.

    It returns numpy float32: `64`, `192`, `768`, `2048` ([b, that many] features) and `logits_unbiased` [b, 1008], see
    `InceptionV3`. Compiled once for every shape; b should be a multiple of the number of local devices.

    Args:
      path: a .pth or .safetensors file with the names of pytorch-fid and torch-fidelity
        (`Mixed_5b.branch1x1.conv.weight`): FID's weights, not torchvision's.
      spatial: whether the function also returns `spatial` [b, 2023], the features of sFID.

    Raises:
      InputError: the file is missing, unreadable, or lacks tensors. The function raises it for what is no image batch.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {os.fspath(path)!r}: get {WHERE}")
    run = RowParallel(InceptionV3(spatial=spatial).apply, {"params": inception_params(read_tensors(path), path)})

    def features(images: np.ndarray) -> dict[str, np.ndarray]:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
            raise InputError(f"images must be uint8 [b, H, W, 3], not {images.dtype} {list(images.shape)}")
        return run(images)

    return features
