"""Tokenizer checkpoints as single files in the published PyTorch layouts: .pt, .pth and .safetensors, both ways.

Reading needs no PyTorch, and neither does writing .safetensors; a .pt file is written by PyTorch itself.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from fvq_jax.interop.infer import infer_network
from fvq_jax.interop.named_tensors import check_ending, read_checkpoint_file, write_checkpoint_file
from fvq_jax.interop.torch_layout import USAGE_BUFFER, tokenizer_params, torch_tensors, usage_buffer_size
from fvq_jax.models.tokenizer import TokenizerNet

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
    tensors, facts = read_checkpoint_file(path, track)
    if str(path).endswith(".safetensors"):
        track = iter  # a .pt file was only mapped, and is read as it is converted
    tensors = _unwrap(tensors)
    said = _said_l2_norm(facts)
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
    check_ending(path)
    tensors = torch_tensors(net, params)
    tensors[USAGE_BUFFER] = np.zeros(usage_buffer_size(net), np.float32)
    write_checkpoint_file(path, tensors, {L2_NORM[0]: net.quantizer.l2_normalize})


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


def _said_l2_norm(facts: Mapping[str, Any]) -> bool | None:
    """What a checkpoint says about unit-length codes; None if nothing."""
    for name in L2_NORM:
        if facts.get(name) is not None:
            return str(facts[name]).lower() == "true"
    return None
