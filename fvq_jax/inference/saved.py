"""Loads a tokenizer from any form in which it is saved, and writes the native folder.

A native folder holds `weights.safetensors`, everything that encoding and decoding need, with the bridge folded into the
codebook; `config.json`, the shape of the network; and, if there is a bridge, `bridge.safetensors`, the codebook before
the bridge and the bridge itself. Only the layout "fvq" and further training need this last file; it may be deleted.
If the bridge has classes, no codebook is folded, since every class has its own: then the last file is needed always.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fvq_jax.inference.location import BRIDGE, WEIGHTS, locate, nothing_there
from fvq_jax.interop.named_tensors import abstract_params, abstract_variables, check_tensors, write_safetensors
from fvq_jax.interop.tokenizer_checkpoint import read_checkpoint
from fvq_jax.interop.torch_file import read_tensors
from fvq_jax.models.layers import levels_from_zero
from fvq_jax.models.quantizers import Quantizer, make_quantizer, quantizer_settings
from fvq_jax.models.tokenizer import TokenizerNet, fold
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.files import read_json, replace_whole
from fvq_jax.runtime.names import flatten, nest
from fvq_jax.runtime.storage import CHECKPOINTS, CONFIG

FORMAT, VERSION = "fvq_jax tokenizer", 2
FIELDS = ("ch", "ch_mult", "num_res_blocks", "z_channels")  # settings of the network, except those of its quantizer
LATER_FIELDS = ("attention_levels", "quant_kernel")  # the same, which configs of earlier versions do not have
# Settings of the quantizer before version 2, when they stood among those of the network.
_OLD_QUANTIZER = (
    "codebook_size",
    "code_dim",
    "bridge",
    "bridge_groups",
    "l2_normalize",
    "search_precision",
    "search_implementation",
)


@dataclasses.dataclass(frozen=True)
class SavedTokenizer:
    """A network, its parameters (float32, on the host) with the bridge if that is known, and the folded codebook.

    `folded` is the codebook [k, d] that replaces codebook and bridge; None if it has not been computed, or if the
    bridge has classes. `layout` is the name of the layout of the published file that it was read from; "" if it comes
    from elsewhere.
    """

    net: TokenizerNet
    params: dict[str, Any]
    folded: np.ndarray | None = None
    layout: str = ""


def load(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    l2_norm: bool | None = None,
    scales: tuple[int, ...] | None = None,
    like: Quantizer | None = None,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> SavedTokenizer:
    """Loads the tokenizer in a published checkpoint, a native folder, or a training workdir (its newest checkpoint).

    WORKDIR/checkpoints/step_N is one checkpoint of a workdir, and the folder of another program the checkpoint in it.

    From a workdir, the moving average of the parameters is taken if there is one. The keywords are for published
    checkpoints, see `read_checkpoint`, also for `like`; `track` wraps the names of their tensors while they are read,
    for instance in a progress bar.

    Raises:
      InputError: there is no tokenizer at `path`, it is damaged or incomplete, or a keyword contradicts it.
    """
    path, step = locate(path, "tokenizer")
    if not path.is_dir():
        found, net, params = read_checkpoint(
            path, layout=layout, l2_norm=l2_norm, scales=scales, like=like, track=track
        )
        return SavedTokenizer(net, params, layout=found.name)
    require(
        layout is None and scales is None, f"layout and scales are for files, and {path} is a folder: leave them out"
    )
    if (path / WEIGHTS).exists():
        saved = _read_folder(path)
    elif (path / CHECKPOINTS).is_dir() and (path / CONFIG).exists():
        saved = _read_workdir(path, step)
    else:
        raise nothing_there(path, "tokenizer")
    if l2_norm is not None and l2_norm != getattr(saved.net.quantizer, "l2_normalize", False):
        raise InputError(f"l2_norm={l2_norm} contradicts {path / CONFIG}, which says {not l2_norm}")
    return saved


def load_params(path: str | os.PathLike[str], net: TokenizerNet) -> dict[str, Any]:
    """Loads the parameters of the tokenizer at `path` (see `load`), on the host, for `net` to start with.

    Raises:
      InputError: there is no tokenizer, or one of another architecture (the message names every difference).
    """
    saved = load(path, like=net.quantizer)
    there, here = _architecture(saved.net), _architecture(net)
    differences = [
        f"tokenizer.{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise InputError(f"{path} holds another network: {'; '.join(differences)}")
    return saved.params


def save_folder(path: str | os.PathLike[str], saved: SavedTokenizer) -> None:
    """Writes a native folder; one that is already there is replaced.

    Raises:
      InputError: `path` is a file, is a training workdir, has a config.json without weights, or cannot be written.
    """
    path = Path(path)
    if (path / CHECKPOINTS).exists() or ((path / CONFIG).exists() and not (path / WEIGHTS).exists()):
        raise InputError(f"{path} holds a training run, which a tokenizer must not overwrite: use another folder")
    if (path / CONFIG).exists() and read_json(path / CONFIG).get("format") != FORMAT:
        raise InputError(f"{path} holds something else than a tokenizer, and is not overwritten: use another folder")
    config = {"format": FORMAT, "version": VERSION, "tokenizer": _settings(saved.net)}
    named = flatten(saved.params)
    bridged = saved.net.quantizer.foldable
    trained = {name: value for name, value in named.items() if bridged and name.startswith("quantizer/")}
    weights = {name: value for name, value in named.items() if name not in trained}
    if bridged and not saved.net.quantizer.classes:
        assert saved.folded is not None
        folded = saved.net.quantizer.folded_params(saved.params.get("quantizer", {}), saved.folded)
        weights |= flatten({"quantizer": folded})
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_safetensors(path / WEIGHTS, weights)
        (path / BRIDGE).unlink(missing_ok=True)
        if bridged:
            write_safetensors(path / BRIDGE, trained)
        with replace_whole(path / CONFIG) as unfinished:
            unfinished.write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the folder {path}: {error.strerror or error}") from error


def upgrade_network(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The section `tokenizer` of a saved config of any version, as this version writes it."""
    if "quantizer" in fields:
        return dict(fields)
    quantizer = {name: fields[name] for name in _OLD_QUANTIZER if name in fields}
    network = {name: value for name, value in fields.items() if name not in quantizer}
    return {**network, "quantizer": {"name": "vector", **quantizer}}


def _settings(net: TokenizerNet) -> dict[str, Any]:
    """The settings from which `_network` makes this network again."""
    network = {name: getattr(net, name) for name in (*FIELDS, *LATER_FIELDS)}
    return {**network, "quantizer": quantizer_settings(net.quantizer)}


def _architecture(net: TokenizerNet) -> dict[str, Any]:
    """What decides the names and shapes of the parameters and what they mean, by the names of a config."""
    kind = {"name": quantizer_settings(net.quantizer)["name"]}
    levels = sorted(levels_from_zero(net.attention_levels, len(net.ch_mult)))  # -1 is another name of the lowest
    return {
        **{name: getattr(net, name) for name in (*FIELDS, *LATER_FIELDS)},
        "attention_levels": tuple(levels),
        **{f"quantizer.{name}": value for name, value in {**kind, **net.quantizer.architecture()}.items()},
    }


def _read_folder(path: Path) -> SavedTokenizer:
    config = read_json(path / CONFIG)
    if config.get("format") != FORMAT or config.get("version") not in range(1, VERSION + 1):
        raise InputError(f"{path / CONFIG} is not the config of a tokenizer that this version can read")
    net = _network(config.get("tokenizer"), path / CONFIG)
    weights = read_tensors(path / WEIGHTS)
    plain, classes = net.clone(quantizer=net.quantizer.folded()), net.quantizer.classes
    usable = {name: shape for name, shape in _shapes(plain).items() if not (classes and name.startswith("quantizer/"))}
    check_tensors(weights, usable, str(path / WEIGHTS))
    if not net.quantizer.foldable:
        return SavedTokenizer(net, nest(weights))
    if not (path / BRIDGE).exists():
        require(not classes, f"{path / BRIDGE} is missing: a tokenizer with a table per class needs it")
        return SavedTokenizer(plain, nest(weights))
    trained = read_tensors(path / BRIDGE)
    wanted = {name: shape for name, shape in _shapes(net).items() if name.startswith("quantizer/")}
    check_tensors(trained, wanted, str(path / BRIDGE))
    return SavedTokenizer(net, nest(weights | trained), weights.get("quantizer/codebook"))


def _read_workdir(path: Path, step: int | None) -> SavedTokenizer:
    config = read_json(path / CONFIG)
    net = _network(config.get("tokenizer"), path / CONFIG)
    net = net.clone(quantizer=net.quantizer.without_training_state())
    state = abstract_variables(net)
    params = state.pop("params")
    # Imported here: Orbax takes a second, and only a workdir needs it.
    from fvq_jax.training.checkpoint import Checkpoints

    averaged = config.get("optim", {}).get("ema_decay", 0) > 0
    wanted = {} if averaged else {"params": params}
    wanted |= {"variables": state} if state else {}
    like = ({"ema": params} if averaged else {}) | ({"networks": {"tokenizer": wanted}} if wanted else {})
    with Checkpoints(path, read_only=True) as checkpoints:
        part = checkpoints.restore_part(like, step)
    network = part.get("networks", {}).get("tokenizer", {})
    params = part["ema"] if averaged else network["params"]
    if not state:
        return SavedTokenizer(net, params)
    # What a quantizer keeps without training it is needed to train on, and in use only the table that it makes.
    if not net.quantizer.foldable:
        raise InputError(f"the quantizer of {path} keeps state that no table can replace")
    plain, folded = fold(net, jax.device_put({"params": params, **network["variables"]}))
    return SavedTokenizer(plain, jax.device_get(folded["params"]))


def _shapes(net: TokenizerNet) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in flatten(abstract_params(net)).items()}


def _network(fields: Any, source: Path) -> TokenizerNet:
    """The network that a config describes; computes in float32, whatever it was trained in."""
    require(isinstance(fields, dict), f"{source} does not describe a tokenizer: it has no section 'tokenizer'")
    try:
        fields = upgrade_network(fields)
        values = {name: fields[name] for name in FIELDS}
        values |= {name: fields[name] for name in LATER_FIELDS if name in fields}
        quantizer = make_quantizer(fields["quantizer"])
        quantizer.check()
        network: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return TokenizerNet(quantizer, **network)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source} does not describe a tokenizer: {error}") from error
