"""Names of nested things: arrays of a tree by their path, settings by their full name; what a misspelt name meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree` as text: networks/tokenizer/params/encoder/..."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """{"encoder/conv_in/conv/kernel": ...}: every leaf of a tree by its path."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nest(named: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """The inverse of `flatten` (and, with the separator ".", of `dotted`): dictionaries inside dictionaries."""
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *parents, last = name.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def dotted(nested: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.hold": 0.3, ...}: every setting of nested mappings by its full name; tuples as lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if hasattr(value, "items"):
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown full name: "; did you mean optim.hold?", or nothing.

    A name with the same last part is the first guess, since a section is forgotten or mistaken more easily than a name.
    """
    known = list(known)
    same = [field for field in known if field.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = same or difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
