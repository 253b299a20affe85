"""A quantizer alone, from a file with the tensors that published programs keep of it."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.interop.evidence import Evidence
from fvq_jax.interop.layouts.quantizer_names import (
    HITS_BUFFER,
    USAGE_BUFFER,
    infer_book,
    infer_scales,
    quantizer_name,
)
from fvq_jax.interop.layouts.rq_vae import STATISTICS, infer_books, joined_books
from fvq_jax.interop.lightning import averaged
from fvq_jax.interop.named_tensors import check_tensors, read_checkpoint_file
from fvq_jax.interop.tokenizer_checkpoint import unwrap
from fvq_jax.interop.torch_arrays import from_torch, torch_shape
from fvq_jax.models.quantizers import QUANTIZERS, make_quantizer, quantizer_fields
from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.models.quantizers.lattice import LatticeQuantizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.names import flatten, nest

_UNREAD = rf"{USAGE_BUFFER}|{HITS_BUFFER}|{STATISTICS}"
_PARTS = r"(embedding|qbridge|quant_resi|embedding_proj|codebooks)\."


def read_quantizer(
    path: str | os.PathLike[str], name: str, settings: Mapping[str, Any]
) -> tuple[Quantizer, dict[str, Any]]:
    """The quantizer in a file, and its variables, float32 on the host.

    The tensors may carry prefixes and lie in wrappers, as in the file of a whole tokenizer.

    Args:
      path: a .pt, .pth, .ckpt or .safetensors file.
      name: the kind of quantizer, as in a config.
      settings: those that tensors do not tell.

    Raises:
      InputError: the kind does not exist or has no tensors, it has no such setting, or the tensors in the file are not
        exactly those of the quantizer.
    """
    require(name in QUANTIZERS, f"there is no quantizer {name!r}: use one of {', '.join(QUANTIZERS)}")
    require(
        not issubclass(QUANTIZERS[name], LatticeQuantizer),
        f"the quantizer {name} has no tensors, so there is no file of it: "
        "make it with fvq_jax.models.quantizers.make_quantizer",
    )
    known = quantizer_fields(name)
    for unknown in settings.keys() - known.keys():
        raise InputError(f"the quantizer {name} has no setting {unknown}: it takes {', '.join(known)}")
    for key, value in settings.items():
        known[key].check(key, value)
    tensors = averaged(read_checkpoint_file(path)[0], r"quantizer?\.", str(path))
    tensors = {_usual(key): value for key, value in unwrap(tensors, _PARTS).items()}
    if name == "residual" and any(key.startswith("codebooks.") for key in tensors):
        tensors, shown = _with_one_book(tensors, settings, str(path))
        settings = {**settings, **shown}
    weights = {key: value for key, value in tensors.items() if not re.fullmatch(_UNREAD, key)}
    quantizer = _infer(name, settings, Evidence(tensors, str(path), f"file of a {name} quantizer"))
    latents = jax.ShapeDtypeStruct((1, *(quantizer.only_grid or (1, 1)), quantizer.latent_dim), jnp.float32)
    made = flatten(dict(jax.eval_shape(quantizer.init, jax.random.key(0), latents)))
    names = {variable: _published(variable, name) for variable in made}
    wanted = {names[v]: torch_shape(v, leaf.shape, quantizer.latent_dim) for v, leaf in made.items()}
    check_tensors(weights, wanted, str(path), f"{name} quantizer")
    return quantizer, nest({v: from_torch(v, np.asarray(weights[names[v]]), leaf.shape) for v, leaf in made.items()})


def _published(variable: str, name: str) -> str:
    """The published name of a variable; InputError if there is none, since files hold no such state."""
    path = variable.partition("/")[2]
    try:
        return quantizer_name(path)
    except KeyError:
        raise InputError(
            f"files of published tensors do not hold {path}, which the quantizer {name} has with these settings"
        ) from None


def _usual(name: str) -> str:
    """The name of a tensor as it is where some scales share a convolution; VAR has others for all and for none."""
    name = re.sub(r"^quant_resi\.qresi\.", "quant_resi.qresi_ls.0.", name)
    return re.sub(r"^quant_resi\.(?=\d)", "quant_resi.qresi_ls.", name)


def _with_one_book(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], source: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of RQ-VAE's quantizer with the books of the first `depth` levels in one, and the settings of levels.

    InputError for a file whose books are not all there, or for settings that contradict it.
    """
    shown = infer_books(Evidence(tensors, source, "file of a residual quantizer"))
    levels, shared = shown["depth"], shown["shared_codebook"]
    names = [f"codebooks.{level}.weight" for level in range(levels)]
    for name in names:
        shape, first = tensors[name].shape, tensors[names[0]].shape
        require(len(shape) == 2, f"{source}: {name} must be [codes + 1, dimension], not {list(shape)}")
        require(shape == first, f"{source}: {name} is {list(shape)}, and {names[0]} is {list(first)}")
    depth = settings.get("depth", levels)
    require(shared or depth <= levels, f"{source} has {levels} levels with a codebook each, so depth cannot be {depth}")
    require(
        settings.get("shared_codebook", shared) == shared,
        f"{source} has {'one codebook for all levels' if shared else 'a codebook for every level'}: "
        f"shared_codebook must be {shared}",
    )
    chosen = {"depth": depth, "shared_codebook": shared or depth == 1}  # a single level has all codes
    rows = (len(tensors[names[0]]) - 1) * (1 if chosen["shared_codebook"] else depth)
    book = joined_books(
        tensors, ResidualQuantizer(bridge="none", codebook_size=rows, code_dim=shown["code_dim"], **chosen)
    )
    others = {key: value for key, value in tensors.items() if key not in names and not re.fullmatch(_UNREAD, key)}
    return others | {"embedding.weight": book}, chosen


def _infer(name: str, settings: Mapping[str, Any], evidence: Evidence) -> Quantizer:
    shown = infer_book(evidence)
    if name == "multi_scale":
        shown |= infer_scales(evidence, settings.get("scales"))
    fields = quantizer_fields(name)
    try:
        quantizer = make_quantizer(
            {"name": name, **{field: value for field, value in shown.items() if field in fields}, **settings}
        )
        quantizer.check()
    except (TypeError, ValueError) as error:
        raise InputError(f"{evidence.source} and the settings given make no {name} quantizer: {error}") from None
    return quantizer
