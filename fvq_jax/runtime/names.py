"""Names of nested things: arrays of a tree by path, settings by full name; and suggestions for misspelt names."""

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
    """{"optim.hold": 0.3, ...}: every setting of nested mappings by its full name; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if hasattr(value, "items"):
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown full name: "; did you mean optim.hold?", or nothing.

    Names with the most similar last part are tried first, since sections are easily forgotten or mistaken.
    """
    known = list(known)
    last = {field: field.rsplit(".", 1)[-1] for field in known}
    alike = difflib.get_close_matches(name.rsplit(".", 1)[-1], last.values(), 1)
    same = [field for field in known if last[field] in alike]
    close = difflib.get_close_matches(name, same, 1, cutoff=0.0) or difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
