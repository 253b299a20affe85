"""A trained tokenizer for use: turns images into codes and back on all local devices, and loads and saves itself.

`saved` and `interop` read and write the files; `models` defines the network.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from fvq_jax.inference.saved import SavedTokenizer, load, save_folder
from fvq_jax.interop.named_tensors import ENDINGS
from fvq_jax.interop.tokenizer_checkpoint import write_checkpoint
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.ops.pixels import to_float
from fvq_jax.runtime.errors import InputError

LAYOUTS = ("llamagen", "fvq")
MAX_PER_DEVICE = 16  # images at once: larger batches go through in parts


class Tokenizer:
    """Encoder, quantizer and decoder with trained weights; everything in float32, results in the host's memory.

    Programs are compiled once for every height and width, and for few batch sizes: a batch is padded to the next power
    of two of images per device, at most `MAX_PER_DEVICE`.
    """

    def __init__(self, saved: SavedTokenizer):
        self._saved = saved
        self.net = saved.net.clone(quantizer=saved.net.quantizer.folded())
        self.params = saved.params
        if saved.net.quantizer.foldable:
            folded = _folded_codebook(saved.net, saved.params) if saved.folded is None else saved.folded
            self._saved = SavedTokenizer(saved.net, saved.params, folded)
            self.params = {**saved.params, "quantizer": {"codebook": folded}}
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self._devices = mesh.size
        self._by_rows = NamedSharding(mesh, P("data"))
        self._on_devices = jax.device_put(self.params, NamedSharding(mesh, P()))
        self._encode = jax.jit(functools.partial(_encode, self.net))
        self._decode = jax.jit(functools.partial(_decode, self.net))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, l2_norm: bool | None = None) -> "Tokenizer":
        """Loads a published checkpoint, a folder that `save_pretrained` wrote, or a training workdir.

        Args:
          path: a .pt, .pth or .safetensors file of FVQ or LlamaGen, from whose tensors the network is inferred; or a
            folder. From a workdir the newest checkpoint is taken, with the moving average if there is one.
          l2_norm: whether codes have unit length, for a checkpoint that does not say so in its `args`; None takes
            what the checkpoint says, or False.

        Raises:
          InputError: there is no tokenizer at `path`, or it is incomplete. The message names tensors that are missing,
            extra or of another shape.
        """
        return cls(load(path, l2_norm=l2_norm))

    @property
    def trained_net(self) -> TokenizerNet:
        """The network as it was trained, with its bridge; `net` has the bridge folded away."""
        return self._saved.net

    @property
    def trained_params(self) -> dict[str, Any]:
        """The parameters of `trained_net`, with the bridge and the codebook before it."""
        return self._saved.params

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return self.net.downsampling

    @functools.cached_property
    def codebook(self) -> Float[np.ndarray, "k d"] | None:
        """The table that is searched: the bridge is applied, and rows have unit length if the codes do.

        None if the quantizer has no table.
        """
        table: Any = jax.jit(functools.partial(self.net.apply, method="table"))({"params": self.params})
        return None if table is None else np.asarray(table)

    def encode(self, images: ArrayLike) -> Int[np.ndarray, "b h w"]:
        """Images to codes: a numpy array, int32 [b, h, w], in [0, k).

        Args:
          images: [b, H, W, 3], uint8, or floating-point in [-1, 1]; any b, H and W multiples of `downsampling`.

        Raises:
          InputError: another shape, type or range.
        """
        images = np.asarray(images)
        factor = self.downsampling
        if images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(f"images must be [b, H, W, 3], not {list(images.shape)}")
        height, width = images.shape[1:3]
        if height % factor or width % factor or not height or not width:
            fitting = " x ".join(str(-(-max(side, 1) // factor) * factor) for side in (height, width))
            raise InputError(
                f"images of {height} x {width} pixels do not fit the down-sampling of {factor}: height and width must "
                f"be multiples of it, for instance {fitting}"
            )
        if images.dtype != np.uint8:
            if not jnp.issubdtype(images.dtype, jnp.floating):
                raise InputError(f"images must be uint8, or floating-point in [-1, 1], not {images.dtype}")
            images = images.astype(np.float32)
            # Resizing and networks may go a little beyond [-1, 1]; values far beyond it were never scaled.
            if images.size and not np.abs(images).max() <= 2:
                raise InputError(
                    f"floating-point images must be in [-1, 1], not from {images.min():g} to {images.max():g} "
                    "(uint8 images are scaled here)"
                )
        codes = (0, height // factor, width // factor)
        return self._in_parts(self._encode, images, np.zeros(codes, np.int32))

    def decode(self, codes: ArrayLike) -> Float[np.ndarray, "b H W 3"]:
        """Codes to images: a numpy array, float32 [b, H, W, 3], in [-1, 1].

        Args:
          codes: whole numbers [b, h, w] in [0, k), of any h and w.

        Raises:
          InputError: another shape, type or range.
        """
        codes = np.asarray(codes)
        if codes.ndim != 3 or 0 in codes.shape[1:] or not jnp.issubdtype(codes.dtype, jnp.integer):
            raise InputError(f"codes must be whole numbers [b, h, w], not {codes.dtype} {list(codes.shape)}")
        size = self.net.quantizer.size
        if codes.size and not 0 <= codes.min() <= codes.max() < size:
            raise InputError(f"codes must be in 0..{size - 1}, and these are from {codes.min()} to {codes.max()}")
        height, width = (side * self.downsampling for side in codes.shape[1:])
        return self._in_parts(self._decode, codes.astype(np.int32), np.zeros((0, height, width, 3), np.float32))

    def save_pretrained(self, path: str | os.PathLike[str], layout: str | None = None) -> None:
        """Saves the tokenizer.

        Args:
          path: a folder, or with a `layout` a file that ends in .safetensors, .pt or .pth (which need PyTorch).
          layout: None writes this package's own folder (weights with the bridge folded, config.json, and the bridge in
            a file of its own). "llamagen" writes what LlamaGen's VQModel loads, with the bridge folded; "fvq" writes
            the published layout of FVQ, with the bridge and the codebook before it. A .safetensors file holds the bare
            tensors, a .pt or .pth file `{"model": tensors, "args": {"codebook_l2_norm": ...}}`, as LlamaGen's programs
            expect: `vq_model.load_state_dict(torch.load(path)["model"])`. That VQModel must have the same sizes and the
            same `codebook_l2_norm`, whose default there is True.

        Raises:
          InputError: the layout cannot hold this tokenizer, or it cannot be written to `path`.
        """
        if layout is None:
            if Path(path).suffix in ENDINGS or Path(path).is_file():
                raise InputError(f"without a layout a folder is written, and {path} is a file: {_layouts()}")
            save_folder(path, self._saved)
        elif layout == "llamagen":
            write_checkpoint(path, self.net, self.params)
        elif layout == "fvq":
            write_checkpoint(path, self.trained_net, self.trained_params)
        else:
            raise InputError(f"unknown layout {layout!r}: {_layouts()}")

    def __repr__(self) -> str:
        quantizer = self.trained_net.quantizer
        return (
            f"Tokenizer({quantizer.size} x {quantizer.latent_dim} codes, {quantizer.description}, "
            f"down-sampling {self.downsampling})"
        )

    def _in_parts(self, program: Callable[[Any, Any], Any], rows: np.ndarray, nothing: np.ndarray) -> np.ndarray:
        """Runs `program` on a batch of any size, in parts; an empty batch gives `nothing`."""
        results = [nothing]
        for start in range(0, len(rows), MAX_PER_DEVICE * self._devices):
            part = rows[start : start + MAX_PER_DEVICE * self._devices]
            per_device = -(-len(part) // self._devices)
            size = self._devices * 2 ** (per_device - 1).bit_length()
            padded = np.zeros((size, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            result = program(self._on_devices, jax.device_put(padded, self._by_rows))
            results.append(np.asarray(result)[: len(part)])
        return np.concatenate(results)


def _encode(net: TokenizerNet, params: dict[str, Any], images: Array) -> Any:
    images = to_float(images) if images.dtype == jnp.uint8 else images
    return net.apply({"params": params}, images, method="encode")


def _decode(net: TokenizerNet, params: dict[str, Any], codes: Array) -> Array:
    images: Any = net.apply({"params": params}, codes, method="decode")
    return jnp.clip(images, -1, 1)


def _folded_codebook(net: TokenizerNet, params: dict[str, Any]) -> np.ndarray:
    """The table [k, d] that replaces codebook and bridge."""
    table = jax.jit(functools.partial(net.apply, method="table"))
    return np.asarray(table({"params": params}))


def _layouts() -> str:
    return f"use layout={' or layout='.join(repr(name) for name in LAYOUTS)} for a file, and no layout for a folder"
