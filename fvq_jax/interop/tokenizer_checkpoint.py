"""Tokenizer checkpoints as single files in the published PyTorch layouts: .pt, .pth and .safetensors, both ways.

Reading needs no PyTorch, and neither does writing .safetensors; a .pt file is written by PyTorch itself.
"""

import argparse
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from absl import logging

from fvq_jax.interop.infer import infer_network
from fvq_jax.interop.named_tensors import write_safetensors
from fvq_jax.interop.torch_file import load_torch_file, named_tensors, read_tensors
from fvq_jax.interop.torch_layout import USAGE_BUFFER, USAGE_BUFFER_SIZE, tokenizer_params, torch_tensors
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole

ENDINGS = (".safetensors", ".pt", ".pth")
L2_NORM = ("codebook_l2_norm", "l2_norm")  # what the published training programs call it in their arguments


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    l2_norm: bool | None = None,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[TokenizerNet, dict[str, Any]]:
    """The network of a published tokenizer checkpoint (FVQ or LlamaGen) and its parameters, float32 on the host.

    The weights may lie in wrappers (`model`, `ema`, `state_dict`; a moving average is preferred) and carry the
    prefixes `module.` and `_orig_mod.`. `l2_norm` overrides what the file says; where neither says, it is False.
    `track` wraps the names of the tensors while they are read, for a progress bar.

    Raises:
      InputError: the file is damaged, or its tensors are not exactly those of a tokenizer.
    """
    if str(path).endswith(".safetensors"):
        tensors, track = read_tensors(path, track), iter  # a .pt file is only mapped, and read as it is converted
        with safetensors.safe_open(path, "np") as file:
            arguments: Any = file.metadata() or {}
    else:
        content = load_torch_file(path)
        tensors = dict(named_tensors(content))
        arguments = content.get("args") if isinstance(content, Mapping) else None
    tensors = _unwrap(tensors)
    said = _said_l2_norm(arguments)
    net = infer_network(tensors, str(path), l2_normalize=bool(said if l2_norm is None else l2_norm))
    if said is None and l2_norm is None and net.quantizer.bridge == "none":
        logging.warning(
            "%s does not say whether its codes have unit length, so they are taken not to: "
            "pass l2_norm=True if they do, as LlamaGen's do",
            path,
        )
    return net, tokenizer_params(tensors, net, str(path), track)


def write_checkpoint(path: str | os.PathLike[str], net: TokenizerNet, params: dict[str, Any]) -> None:
    """Writes a network with its bridge, if any, in the published layout.

    .pt and .pth hold `{"model": tensors, "args": {"codebook_l2_norm": ...}}`, which is how published programs load them
    (`load_state_dict(torch.load(path)["model"])`), .safetensors the bare tensors, and `codebook_l2_norm` as metadata.

    Raises:
      InputError: the layout cannot hold this network, the ending of `path` is unknown, the file cannot be written,
        or PyTorch is needed and missing.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InputError(f"cannot tell the format of {path}: the name must end in one of {', '.join(ENDINGS)}")
    tensors = torch_tensors(net, params)
    tensors[USAGE_BUFFER] = np.zeros(USAGE_BUFFER_SIZE, np.float32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            write_safetensors(path, tensors, {"format": "pt", L2_NORM[0]: str(net.quantizer.l2_normalize).lower()})
        else:
            _write_torch(path, tensors, net.quantizer.l2_normalize)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _unwrap(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of the tokenizer under their own names, from whatever they are wrapped in."""
    plain = {re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", name): value for name, value in tensors.items()}
    sizes: dict[str, int] = {}
    for name in plain:
        if match := re.match(r"((?:.*?\.)??)(encoder|decoder|quantize)\.", name):
            sizes[match[1]] = sizes.get(match[1], 0) + 1

    def rank(prefix: str) -> tuple[bool, int]:
        return "ema" in re.split(r"[._]", prefix), sizes[prefix]

    prefix = max(sizes, key=rank, default="")
    if prefix:
        logging.info("the weights are taken from %r", prefix.rstrip("."))
    return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}


def _said_l2_norm(arguments: Any) -> bool | None:
    """What a checkpoint's `args`, or a .safetensors file's metadata, say about unit-length codes; None if nothing."""
    if isinstance(arguments, types.SimpleNamespace | argparse.Namespace):
        arguments = vars(arguments)
    for name in L2_NORM:
        value = arguments.get(name) if isinstance(arguments, Mapping) else None
        if value is not None:
            return str(value).lower() == "true"
    return None


def _write_torch(path: Path, tensors: dict[str, np.ndarray], l2_norm: bool) -> None:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "writing a .pt file needs PyTorch, which is not installed: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu (the CPU build is enough), "
            "or write a .safetensors file, which needs no PyTorch"
        ) from error
    # A plain dictionary: PyTorch's own safe loading (weights_only) refuses an argparse.Namespace.
    weights = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in tensors.items()}
    try:
        with replace_whole(path) as unfinished:
            torch.save({"model": weights, "args": {L2_NORM[0]: l2_norm}}, unfinished)
    except RuntimeError as error:  # PyTorch raises it for a path that cannot be written
        raise OSError(" ".join(str(error).split())) from error
