"""Loads a generator from any form in which it is saved, and writes the native folder.

A native folder holds `weights.safetensors`, all parameters in float32, and `config.json`: the shape of the network, and
under `provenance` which tokenizer's codes it was trained on, as far as that is known.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.inference.location import WEIGHTS, locate, nothing_there
from fvq_jax.interop.gpt_checkpoint import is_gpt_file, read_gpt
from fvq_jax.interop.named_tensors import check_tensors, write_safetensors
from fvq_jax.interop.torch_file import read_tensors
from fvq_jax.models.gpt import GPT
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.files import read_json, replace_whole
from fvq_jax.runtime.names import flatten, nest
from fvq_jax.runtime.storage import CHECKPOINTS, CONFIG, PROVENANCE

FORMAT, VERSION = "fvq_jax generator", 1
SECTION = "generator"  # of a config; also the name of the network in a checkpoint
# What decides what a network computes; the last three have defaults, and dropout does nothing outside training.
FIELDS = ("vocab", "classes", "grid", "layers", "width", "heads", "hidden", "class_dropout", "rope_base", "eps")
_OPTIONAL = ("class_dropout", "rope_base", "eps")
CONDITIONS = ("none", "label", "null")  # what a tokenizer with a table per class was given when codes were extracted


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Which codes a generator was trained on; every field is empty if it is not known.

    Attributes:
      tokenizer: the fingerprint of the tokenizer.
      condition: one of `CONDITIONS`.
      image_size: side of the pictures.
      class_names: a name for every class.
    """

    tokenizer: str = ""
    condition: str = ""
    image_size: int = 0
    class_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SavedGenerator:
    """A network, its parameters (float32, on the host), and where its codes come from."""

    net: GPT
    params: dict[str, Any]
    provenance: Provenance = Provenance()


def load_generator(
    path: str | os.PathLike[str],
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    classes: int | None = None,
    use_ema: bool | None = None,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> SavedGenerator:
    """Loads the generator in a file of LlamaGen, a native folder, or a training workdir (its newest checkpoint).

    Args:
      path: the file, or the folder of another program with it; or a folder of ours; or WORKDIR/checkpoints/step_N, one
        checkpoint of a workdir.
      heads, grid, classes: what the tensors of a file do not tell, see `interop.gpt_checkpoint.read_gpt`. For a folder
        they must be what it says, if they are given.
      use_ema: whether the moving average of the parameters is taken from a workdir; None: if there is one.
      track: wraps the names of the tensors of a file while they are read, for instance in a progress bar.

    Raises:
      InputError: there is no generator at `path`, it is damaged or incomplete, or a keyword contradicts it.
    """
    path, step = locate(path, "generator")
    workdir = (path / CHECKPOINTS).is_dir() and (path / CONFIG).exists()
    require(use_ema is None or workdir, f"{path} is no training workdir, so use_ema does nothing: leave it out")
    if not path.is_dir():
        return SavedGenerator(*read_gpt(path, heads=heads, grid=grid, classes=classes, track=track))
    if workdir:
        saved = _read_workdir(path, use_ema, step)
    elif (path / WEIGHTS).exists():
        saved = _read_folder(path)
    else:
        raise nothing_there(path, "generator")
    for name, given in (("heads", heads), ("grid", grid and tuple(grid)), ("classes", classes)):
        there = getattr(saved.net, name)
        require(given in (None, there), f"{name}={given} contradicts {path / CONFIG}, which says {there}")
    return saved


def is_generator(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is one that `load_generator` reads, and not a tokenizer.

    Looks at names of tensors and at config.json only. InputError if these are damaged, or nothing is there.
    """
    path, _ = locate(path, "tokenizer or generator")
    if path.is_file():
        return is_gpt_file(path)
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    return config.get("format") == FORMAT or config.get("task") == SECTION


def save_generator_folder(path: str | os.PathLike[str], saved: SavedGenerator) -> None:
    """Writes a native folder; one that is already there is replaced.

    Raises:
      InputError: `path` is a file, is a training workdir, holds something else than a generator, or cannot be written.
    """
    path = Path(path)
    if (path / CHECKPOINTS).exists():
        raise InputError(f"{path} holds a training run, which a generator must not overwrite: use another folder")
    if (path / CONFIG).exists() and read_json(path / CONFIG).get("format") != FORMAT:
        raise InputError(f"{path} holds something else than a generator, and is not overwritten: use another folder")
    settings = {name: getattr(saved.net, name) for name in FIELDS}
    provenance = {name: value for name, value in dataclasses.asdict(saved.provenance).items() if value}
    config = {"format": FORMAT, "version": VERSION, SECTION: settings, "provenance": provenance}
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_safetensors(path / WEIGHTS, flatten(saved.params))
        with replace_whole(path / CONFIG) as unfinished:
            unfinished.write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the folder {path}: {error.strerror or error}") from error


def weights_digest(params: Any) -> str:
    """16 hexadecimal digits that say which weights these are: a SHA-256 over their names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten(params).items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _read_folder(path: Path) -> SavedGenerator:
    config = read_json(path / CONFIG)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise InputError(f"{path / CONFIG} is not the config of a generator that this version can read")
    net = _network(config.get(SECTION), path / CONFIG)
    weights = read_tensors(path / WEIGHTS)
    wanted = {name: leaf.shape for name, leaf in flatten(_abstract_params(net)).items()}
    check_tensors(weights, wanted, str(path / WEIGHTS), "generator")
    return SavedGenerator(net, nest(weights), _provenance(config.get("provenance", {}), path / CONFIG))


def _read_workdir(path: Path, use_ema: bool | None, step: int | None) -> SavedGenerator:
    config = read_json(path / CONFIG)
    net = _network(config.get(SECTION), path / CONFIG)
    averaged = config.get("optim", {}).get("ema_decay", 0) > 0
    require(averaged or not use_ema, f"{path} keeps no moving average (optim.ema_decay is 0): leave out use_ema")
    # Imported here: Orbax takes a second, and only a workdir needs it.
    from fvq_jax.training.checkpoint import Checkpoints

    params = _abstract_params(net)
    with Checkpoints(path, read_only=True) as checkpoints:
        if averaged and use_ema is not False:
            params = checkpoints.restore_part({"ema": params}, step)["ema"]
        else:
            like = {"networks": {SECTION: {"params": params}}}
            params = checkpoints.restore_part(like, step)["networks"][SECTION]["params"]
    known = read_json(path / PROVENANCE) if (path / PROVENANCE).exists() else {}
    return SavedGenerator(net, params, _provenance(known, path / PROVENANCE))


def _abstract_params(net: GPT) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of `net`, without making one."""
    labels, codes = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, net.length)))
    return dict(jax.eval_shape(net.init, jax.random.key(0), labels, codes)["params"])


def _network(fields: Any, source: Path) -> GPT:
    """The network that a config describes; computes in float32, whatever it was trained in."""
    require(isinstance(fields, dict), f"{source} does not describe a generator: it has no section {SECTION!r}")
    try:
        values = {name: fields[name] for name in FIELDS if name in fields or name not in _OPTIONAL}
        rows, columns = values["grid"]
        net = GPT(**values | {"grid": (int(rows), int(columns))})
        _abstract_params(net)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{source} does not describe a generator: {error}") from error
    return net


def _provenance(known: Any, source: Path) -> Provenance:
    try:
        named = {field.name: known[field.name] for field in dataclasses.fields(Provenance) if field.name in known}
        return Provenance(**named | {"class_names": tuple(named.get("class_names", ()))})
    except TypeError as error:
        raise InputError(f"{source} does not say where codes come from: {error}") from error
