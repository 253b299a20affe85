"""LlamaGen's class-conditional generators (c2i) as single files: .pt, .pth and .safetensors, both ways.

Reading needs no PyTorch, and neither does writing .safetensors. Names and shapes of the tensors: `gpt_layout`.
"""

import collections
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from fvq_jax.interop.gpt_layout import NAMES, gpt_facts, gpt_params, gpt_tensors, infer_gpt
from fvq_jax.interop.named_tensors import check_ending, read_checkpoint_file, write_checkpoint_file
from fvq_jax.interop.safetensors_files import is_safetensors
from fvq_jax.interop.torch_file import tensor_names
from fvq_jax.models.gpt import GPT

# Names that torch.compile, FSDP and activation checkpointing put between those of the modules.
_INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OURS = re.compile(rf"((?:.*?\.)??)({NAMES})")
_COMPUTED = re.compile(r"freqs_cis|causal_mask|.*kv_cache.*")  # what the model computes or keeps while it samples


def read_gpt(
    path: str | os.PathLike[str],
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    classes: int | None = None,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[GPT, dict[str, Any]]:
    """The network of a published generator and its parameters, float32 on the host, from any floating-point type.

    The weights may be wrapped (`model`, `module`, `state_dict`), bare (models that were trained with FSDP), and may
    carry the prefixes `module.` and `_orig_mod.`. They are those that the published programs sample with: a moving
    average (`ema`) is taken only from a file without other weights. Tables that the model computes itself are skipped.

    Args:
      path: the file.
      heads: attention heads; needed for sizes that were not published if the file does not say it.
      grid: rows and columns of the codes of an image; needed if the file does not say it. Published files do not.
      classes: how many classes there are, for a file that does not say it; see `infer_gpt`.
      track: wraps the names of the tensors while they are read, for a progress bar.

    Returns:
      The network, and its parameters as the module nests them. Its `class_dropout` is 0 if the model has no row for "no
      class"; then that row is zero, and guidance is not possible.

    Raises:
      InputError: the file is damaged, its tensors are not exactly those of a class-conditional generator, or one of
        the keywords is needed or does not fit. One line each.
    """
    tensors, facts = read_checkpoint_file(path, track)
    if is_safetensors(path):
        track = iter  # a .pt file was only mapped, and is read as it is converted
    tensors = _unwrap(tensors)
    net = infer_gpt(tensors, facts, str(path), heads=heads, grid=grid, classes=classes)
    return net, gpt_params(tensors, net, str(path), track)


def write_gpt(path: str | os.PathLike[str], net: GPT, params: Mapping[str, Any]) -> None:
    """Writes a generator as LlamaGen's programs load it, all float32.

    .pt and .pth hold `{"model": tensors, "args": ...}` and need PyTorch (`load_state_dict(torch.load(path)["model"])`),
    .safetensors the bare tensors, and the same arguments as metadata. These say what tensors do not: `n_head`,
    `num_classes`, `grid` and more, so that `read_gpt` needs no keyword. A network with `class_dropout` 0 is written
    without the row of "no class", as the published code has it.

    Raises:
      InputError: the ending of `path` is unknown, the file cannot be written, or PyTorch is needed and missing.
    """
    path = Path(path)
    check_ending(path)
    write_checkpoint_file(path, gpt_tensors(net, params), gpt_facts(net))


def is_gpt_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds tensors of a generator; reads no tensor. InputError if it is missing or damaged."""
    return any(re.search(r"(^|\.)(tok_embeddings|cls_embedding)\.", name) for name in tensor_names(path))


def _unwrap(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of the generator under their own names, from whatever they are wrapped in."""
    plain = {_INSIDE.sub("", name): value for name, value in tensors.items()}
    found = collections.Counter(match[1] for name in plain if (match := _OURS.fullmatch(name)))

    def rank(prefix: str) -> tuple[bool, int]:
        return "ema" not in re.split(r"[._]", prefix), found[prefix]

    prefix = max(found, key=rank, default="")
    if prefix:
        logging.info("the weights are taken from %r", prefix.rstrip("."))
    ours = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
    return {name: value for name, value in ours.items() if not _COMPUTED.fullmatch(name)}
