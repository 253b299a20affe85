"""Arrays of one parameter as PyTorch keeps them: convolutions are OIHW and linear layers [out, in].

Here they are HWIO and [in, out]. `path` is that of the parameter, for instance encoder/conv_in/conv/kernel.
"""

import math

import numpy as np


def to_torch(path: str, value: np.ndarray, code_dim: int) -> np.ndarray:
    """The array of PyTorch, a view where that is possible; `code_dim` is the dimension of codes."""
    if path.endswith("compress/kernel"):
        # The published bridge compresses with a convolution whose stride is its size: a linear layer on patches.
        patch = math.isqrt(value.shape[0] // code_dim)
        value = value.reshape(patch, patch, code_dim, -1)
    if path.endswith("/kernel"):
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    if path.endswith("/position_embedding"):
        value = value[None]
    return value


def from_torch(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_torch`, float32, of this shape."""
    if path.endswith("/kernel"):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value.reshape(shape), np.float32)


def torch_shape(path: str, shape: tuple[int, ...], code_dim: int) -> tuple[int, ...]:
    """The shape that `to_torch` gives."""
    return to_torch(path, np.broadcast_to(np.float32(0), shape), code_dim).shape
