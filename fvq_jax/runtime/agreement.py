"""Agreement of the processes of a run: an error in one is raised in all, and a difference between them is named.

Without this, the other processes would wait in a collective for one that has already left. Every function here is a
collective: all processes call it at the same point. With a single process nothing is sent.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from fvq_jax.runtime.errors import InputError, RunError
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.names import dotted

T = TypeVar("T")


def everywhere(action: Callable[[], T]) -> T:
    """Returns what `action` returns here, once it has succeeded in every process.

    If it raises in one process, this raises in all: InputError for bad input, RunError for what ended a run that had
    begun. The message names the process, unless all processes have the same message.
    """
    if jax.process_count() == 1:
        return action()
    own: InputError | RunError | None = None
    try:
        result = action()
    except (InputError, RunError) as error:
        own = error
    # Texts are sent only after an error: this is called often (for every batch), and nearly always nothing is wrong.
    kinds = rows_of_all_hosts(np.array([0 if own is None else 1 if isinstance(own, InputError) else 2], np.int32))
    if not kinds.any():
        return result
    failed = {index: text for index, text in enumerate(gather_texts("" if own is None else str(own))) if text}
    if len(failed) == jax.process_count() and len(set(failed.values())) == 1:
        text = next(iter(failed.values()))
    else:
        text = "; ".join(f"process {index}: {text}" for index, text in failed.items())
    # All processes end with the same exit code: if one raised RunError, all do, even one that saw bad input.
    ending: InputError | RunError = RunError(text) if 2 in kinds else InputError(text)
    ending.shared = True
    raise ending from own


def check_same(values: Mapping[str, Any]) -> None:
    """Raises InputError in all processes if `values`, a nested mapping of plain JSON, differ between them."""
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
    """Returns the texts of all processes, in the order of the processes."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = rows_of_all_hosts(np.array([data.size], np.int32))
    padded = np.zeros((1, max(1, lengths.max())), np.uint8)
    padded[0, : data.size] = data
    rows = rows_of_all_hosts(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
