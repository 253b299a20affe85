"""Tokenizer checkpoints as single files in published PyTorch layouts: .pt, .pth, .ckpt and .safetensors, both ways.

Reading needs no PyTorch, and neither does writing .safetensors; a .pt file is written by PyTorch itself. What each
layout is: `fvq_jax.interop.layouts`.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from fvq_jax.interop.layouts import LAYOUTS, layout_of, recognised
from fvq_jax.interop.layouts.fvq import FVQ, FVQ_RQ
from fvq_jax.interop.layouts.layout import Layout
from fvq_jax.interop.lightning import averaged
from fvq_jax.interop.named_tensors import check_ending, read_checkpoint_file, write_checkpoint_file
from fvq_jax.interop.safetensors_files import is_safetensors
from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import require

L2_NORM = ("codebook_l2_norm", "l2_norm")  # what the published training programs call it in their arguments
_PARTS = r"(encoder|decoder|quantizer?|quant_conv|post_quant_conv)\."


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    l2_norm: bool | None = None,
    scales: tuple[int, ...] | None = None,
    like: Quantizer | None = None,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[Layout, TokenizerNet, dict[str, Any]]:
    """The layout of a published tokenizer checkpoint, its network, and the parameters, float32 on the host.

    The weights may lie in wrappers (`model`, `ema`, `state_dict`; a moving average is preferred) and carry the
    prefixes `module.` and `_orig_mod.`.

    Args:
      path: the file.
      layout: the name of its layout, where tensors do not tell; None recognises it.
      l2_norm: whether codes have unit length; None takes what the file says, or else False.
      scales: the sides of the grids of codes of a multi-scale quantizer; None takes the published ones.
      like: decides what neither the tensors, nor what stands beside them, nor the keywords tell; for whoever wants this
        quantizer.
      track: wraps the names of the tensors while they are read, for a progress bar.

    Raises:
      InputError: the file is damaged, in no layout that is read, its tensors are not exactly those of a tokenizer, or
        such a tokenizer has no unit-length codes or scales that were given.
    """
    tensors, facts = read_checkpoint_file(path, track)
    if is_safetensors(path):
        track = iter  # a .pt file was only mapped, and is read as it is converted
    tensors = unwrap(tensors, recognised=recognised)
    ours = facts if str(facts.get("layout")) in LAYOUTS else {}  # other programs may mean other things by these names
    chosen = layout_of(tensors, str(path), layout or ours.get("layout"))
    if layout is None and chosen is FVQ and isinstance(like, ResidualQuantizer):  # the same tensors
        chosen = FVQ_RQ
    read = f"{path} is read as {chosen.name} ({chosen.title})"
    require(
        scales is None or chosen.quantizer == "multi_scale",
        f"scales are for a tokenizer with several scales, and {read}: leave them out",
    )
    require(
        not l2_norm or chosen.quantizer == "vector",
        f"l2_norm is for a tokenizer with a vector quantizer, and {read}: leave it out",
    )
    tensors = averaged(tensors, _PARTS, str(path))
    said = {
        "l2_norm": _first(l2_norm, _said_l2_norm(facts), getattr(like, "l2_normalize", None)),
        "depth": _first(ours.get("depth"), getattr(like, "depth", None)),
        "scales": _first(scales, ours.get("scales"), getattr(like, "scales", None)),
    }
    net = chosen.network(tensors, said, str(path))
    if said["l2_norm"] is None and chosen.name == "llamagen":
        logging.warning(
            "%s does not say whether its codes have unit length, so they are taken not to: "
            "pass l2_norm=True if they do, as LlamaGen's do",
            path,
        )
    return chosen, net, chosen.params(tensors, net, str(path), track)


def write_checkpoint(path: str | os.PathLike[str], layout: str, net: TokenizerNet, params: dict[str, Any]) -> None:
    """Writes a network in a published layout, as the published programs load it.

    .pt, .pth and .ckpt hold the tensors where the layout has them (for LlamaGen and FVQ `{"model": tensors, "args":
    {"codebook_l2_norm": ...}}`), .safetensors the bare tensors, and what they do not tell as metadata. A layout that is
    not `bridged` wants a network whose bridge is folded.

    Raises:
      InputError: the layout cannot hold this network, the ending of `path` is unknown, the file cannot be written,
        or PyTorch is needed and missing.
    """
    path, form = Path(path), LAYOUTS[layout]
    check_ending(path)
    tensors = form.tensors(net, params)
    write_checkpoint_file(path, tensors | form.beside(net, tensors), form.facts(net), form.wrapper)


def unwrap(
    tensors: Mapping[str, np.ndarray],
    parts: str = _PARTS,
    recognised: Callable[[Collection[str]], bool] = lambda names: True,
) -> dict[str, np.ndarray]:
    """The weights under their own names, which start with one of `parts`, from whatever they are wrapped in.

    Other networks may lie beside them, with names of the same kind. So of several groups, those whose names are
    `recognised` come first, then moving averages, then the largest.
    """
    plain = {re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", name): value for name, value in tensors.items()}
    sizes: dict[str, int] = {}
    for name in plain:
        for match in re.finditer(rf"(?:^|(?<=\.)){parts}", name):
            sizes[name[: match.start()]] = sizes.get(name[: match.start()], 0) + 1

    def group(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in plain if name.startswith(prefix)]

    def rank(prefix: str) -> tuple[bool, bool, int]:
        return recognised(group(prefix)), "ema" in re.split(r"[._]", prefix), sizes[prefix]

    prefix = max(sizes, key=rank, default="")
    if prefix:
        logging.info("the weights are taken from %r", prefix.rstrip("."))
    return {name: plain[prefix + name] for name in group(prefix)}


def _first(*answers: Any) -> Any:
    """The first answer that is not None, or None."""
    return next((answer for answer in answers if answer is not None), None)


def _said_l2_norm(facts: Mapping[str, Any]) -> bool | None:
    """What a checkpoint says about unit-length codes; None if nothing."""
    for name in L2_NORM:
        if facts.get(name) is not None:
            return str(facts[name]).lower() == "true"
    return None
