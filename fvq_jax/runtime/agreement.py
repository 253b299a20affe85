"""Checks at the start of a run of several processes: an error in one of them is raised in all of them.

Without this the others would wait in their next collective for one that has already left. Every function here is a
collective: all processes call it at the same point. With a single process nothing is sent.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.names import dotted

T = TypeVar("T")


def everywhere(action: Callable[[], T]) -> T:
    """Returns what `action` returns here, once it has succeeded in every process.

    Raises InputError in all of them if it did in one, and says in which.
    """
    if jax.process_count() == 1:
        return action()
    result, message = None, ""
    try:
        result = action()
    except InputError as error:
        message = str(error)
    failed = {index: text for index, text in enumerate(gather_texts(message)) if text}
    if not failed:
        return result
    if len(set(failed.values())) == 1 and len(failed) == jax.process_count():
        raise InputError(next(iter(failed.values())))
    raise InputError("; ".join(f"process {index}: {text}" for index, text in failed.items()))


def check_same(values: Mapping[str, Any]) -> None:
    """Raises InputError in all processes if `values`, nested by name and made of plain JSON, differ between them."""
    if jax.process_count() == 1:
        return
    first, *others = (dotted(json.loads(text)) for text in gather_texts(json.dumps(values, sort_keys=True)))
    for index, other in enumerate(others, start=1):
        differing = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        if differing:
            shown = ", ".join(f"{name} is {other.get(name)} and not {first.get(name)}" for name in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise InputError(f"process {index} differs from process 0: {shown}{more}; start all with the same command")


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = rows_of_all_hosts(np.array([data.size], np.int32))
    padded = np.zeros((1, max(1, lengths.max())), np.uint8)
    padded[0, : data.size] = data
    rows = rows_of_all_hosts(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
