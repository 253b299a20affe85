"""Tensors by name: which ones a network needs, the check that a set is exactly that, and files of them."""

import json
import os
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fvq_jax.interop.safetensors_files import is_safetensors, safetensors_metadata
from fvq_jax.interop.torch_file import load_torch_file, named_tensors, read_tensors
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole

ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt")  # of the files that are read and written
SHOWN = 10  # names in a message about a bad checkpoint
_PLAIN = (bool, int, float, str, list, tuple)  # types of facts; None says nothing


def abstract_variables(net: TokenizerNet) -> dict[str, Any]:
    """Shapes and dtypes of the variables of `net` by collection: `params`, and its state if there is any."""
    h, w = net.quantizer.only_grid or (1, 1)
    image = jax.ShapeDtypeStruct((1, h * net.downsampling, w * net.downsampling, 3), jnp.float32)
    variables = dict(jax.eval_shape(net.init, jax.random.key(0), image))
    variables.pop("intermediates", None)
    return variables


def abstract_params(net: TokenizerNet) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of `net`, without making one."""
    return abstract_variables(net)["params"]


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, all float32; it replaces what is at `path` once it is whole. May raise OSError."""
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    with replace_whole(path) as unfinished:
        # Not save_file, which makes files that no other user can read.
        unfinished.write_bytes(safetensors.numpy.save(arrays, metadata))


def read_checkpoint_file(
    path: str | os.PathLike[str], track: Callable[[Iterable[str]], Iterable[str]] = iter
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file as `read_tensors` names them, and the facts beside them.

    These are the plain values in the `args` of a .pt, .pth or .ckpt file (a dictionary or a Namespace), or the metadata
    of a .safetensors file with what is JSON decoded; an empty dictionary if there are none. `track` and errors as for
    `read_tensors`.
    """
    if is_safetensors(path):
        tensors = read_tensors(path, track)
        return tensors, {name: _decoded(text) for name, text in safetensors_metadata(path).items()}
    content = load_torch_file(path)
    arguments = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(arguments, types.SimpleNamespace):
        arguments = vars(arguments)
    plain = arguments.items() if isinstance(arguments, Mapping) else ()
    facts = {name: value for name, value in plain if isinstance(value, _PLAIN)}
    return named_tensors(content, path), facts


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def write_checkpoint_file(
    path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], wrapper: str = "model"
) -> None:
    """Writes tensors, and `facts` that they do not tell, in the form of the published programs; all float32.

    A .pt, .pth or .ckpt file is `{wrapper: tensors, "args": facts}`, or just the tensors if `wrapper` is "", and is
    written by PyTorch; a .safetensors file is the bare tensors, with the facts as metadata: text as it is, everything
    else as JSON. Folders are made as needed.

    Raises:
      InputError: the ending is another one, PyTorch is needed and missing, or the file cannot be written.
    """
    check_ending(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            texts = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
            write_safetensors(path, tensors, {"format": "pt", **texts})
        else:
            _write_torch(path, tensors, facts, wrapper)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def check_ending(path: Path) -> None:
    """InputError unless `write_checkpoint_file` knows what to write to a file of that name."""
    if path.suffix not in ENDINGS:
        raise InputError(f"cannot tell the format of {path}: the name must end in one of {', '.join(ENDINGS)}")


def _write_torch(path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], wrapper: str) -> None:
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
            torch.save({wrapper: weights, "args": dict(facts)} if wrapper else weights, unfinished)
    except RuntimeError as error:  # PyTorch raises it for a path that cannot be written
        raise OSError(" ".join(str(error).split())) from error


def check_tensors(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], source: str, what: str = "tokenizer"
) -> None:
    """InputError, naming `source`, unless `tensors` are floating-point and have exactly the `wanted` names and shapes.

    `what` is what they should be. Lists what is missing, extra, of another shape or type: the first ten names of each,
    and how many there are.
    """
    common = [name for name in wanted if name in tensors]
    found = {
        "missing": [name for name in wanted if name not in tensors],
        "extra": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(wanted[name])}"
            for name in common
            if tensors[name].shape != wanted[name]
        ],
        "not floating-point": [
            f"{name} ({tensors[name].dtype})"
            for name in common
            if not jnp.issubdtype(tensors[name].dtype, jnp.floating)
        ],
    }
    problems = [
        f"{len(names)} tensor{'' if len(names) == 1 else 's'} {what}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for what, names in found.items()
        if names
    ]
    if problems:
        raise InputError(f"{source} does not hold this {what}: {'; '.join(problems)}")
