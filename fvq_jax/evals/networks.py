"""The trained networks that some metrics need, from local files; a metric without its files is not computed."""

import dataclasses
import functools
import os
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fvq_jax.evals.inception import load_inception
from fvq_jax.interop.inception import WHERE
from fvq_jax.interop.lpips import installed_heads, lpips_params
from fvq_jax.interop.torch_file import read_tensors
from fvq_jax.models.frozen.lpips import ALEXNET, VGG16, Backbone, lpips_distance
from fvq_jax.ops.pixels import to_float
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.row_parallel import RowParallel

File = str | os.PathLike[str] | None
# metric: (backbone, name of the file with its weights, name of the file with the LPIPS heads)
LPIPS = {"lpips_vgg": (VGG16, "vgg16", "lpips_vgg"), "lpips_alex": (ALEXNET, "alexnet", "lpips_alex")}
FILES = {
    "inception": WHERE,
    "vgg16": VGG16.weights,
    "lpips_vgg": VGG16.heads,
    "alexnet": ALEXNET.weights,
    "lpips_alex": ALEXNET.heads,
}
_LPIPS_BYTES = 525  # that XLA takes for each value of a picture, with VGG16; with AlexNet 20


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks that were found.

    Attributes:
      inception: as `load_inception` returns it, or None.
      lpips: by metric, a function of two uint8 image batches [b, H, W, 3] to the distances [b].
      not_computed: by metric, what is missing and what to do.
    """

    inception: Callable[[np.ndarray], dict[str, np.ndarray]] | None
    lpips: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]
    not_computed: dict[str, str]


def load_networks(
    files: Mapping[str, File], size: int, called: Mapping[str, str] = types.MappingProxyType({})
) -> Networks:
    """The networks whose `files` are given (by names of `FILES`; None: not given), for pictures of `size` pixels.

    Heads of LPIPS that are not given are those of the installed package `lpips`, if it is there.

    Raises:
      InputError: a file is not there, or damaged, or holds something else. The first kind is named as in `called`, or
        else by its command line option.
    """
    there = {name: path for name, path in files.items() if path is not None}
    for name, path in there.items():
        if not os.path.isfile(path):
            what = called.get(name, option(name))
            raise InputError(f"{what}: there is no file {os.fspath(path)!r} (leave it out to do without its metrics)")
    missing: dict[str, str] = {}
    inception = None
    if "inception" in there:
        inception = load_inception(there["inception"])
    else:
        missing |= dict.fromkeys(("rfid", "inception_score"), _advice("inception"))
    lpips: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {}
    for metric, (backbone, weights, heads) in LPIPS.items():
        if size < backbone.least:
            missing[metric] = f"needs pictures of at least {backbone.least} pixels, not {size}"
            continue
        if heads not in there and weights in there and (installed := installed_heads(backbone)):
            there[heads] = installed
        absent = [name for name in (weights, heads) if name not in there]
        tensors = {} if heads in absent else read_tensors(there[heads])
        source = there.get(heads)
        if "net.slice1.0.weight" in tensors:  # heads and backbone in one file
            absent = []
        elif not absent:
            source = there[weights]
            tensors |= read_tensors(source)
        if absent:
            missing[metric] = "; ".join(_advice(name) for name in absent)
        else:
            params = lpips_params(tensors, backbone, source, there[heads])
            distance = functools.partial(_distance, backbone)
            lpips[metric] = RowParallel(distance, params, bytes_per_value=_LPIPS_BYTES)
    return Networks(inception, lpips, missing)


def option(name: str) -> str:
    """The command line option for a file."""
    return f"--{name.replace('_', '-')}"


def _distance(backbone: Backbone, params: Any, a: Any, b: Any) -> Any:
    return lpips_distance(params, to_float(a), to_float(b), backbone=backbone)


def _advice(name: str) -> str:
    return f"not given: get {FILES[name]} and pass {option(name)}=FILE"
