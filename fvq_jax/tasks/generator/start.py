"""The parameters of a saved generator, for a new run to start with (`init_from`)."""

import os
from typing import Any

from fvq_jax.inference.location import locate
from fvq_jax.inference.saved_generator import load_generator
from fvq_jax.models.gpt import GPT, hidden_width
from fvq_jax.runtime.errors import InputError

_SETTINGS = ("vocab", "classes", "grid", "layers", "width", "heads", "hidden", "rope_base", "eps")


def load_params(path: str | os.PathLike[str], net: GPT) -> dict[str, Any]:
    """Loads the parameters of the generator at `path`, in whatever form it was saved, on the host, for `net`.

    Raises:
      InputError: there is no generator, or one of another architecture (the message names every difference).
    """
    # What the tensors of a file do not tell is taken to be as here; a folder says it.
    is_file = locate(path, "generator")[0].is_file()
    unknown: dict[str, Any] = {"heads": net.heads, "grid": net.grid, "classes": net.classes} if is_file else {}
    saved = load_generator(path, **unknown)
    there, here = _architecture(saved.net), _architecture(net)
    differences = [
        f"generator.{name} is {there[name]!r} there and {here[name]!r} here"
        for name in _SETTINGS
        if there[name] != here[name]
    ]
    if differences:
        raise InputError(f"{path} holds another network: {'; '.join(differences)}")
    return saved.params


def _architecture(net: GPT) -> dict[str, Any]:
    settings = {name: getattr(net, name) for name in _SETTINGS}
    return settings | {"grid": tuple(net.grid), "hidden": net.hidden or hidden_width(net.width)}
