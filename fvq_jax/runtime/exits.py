"""How every program of this package ends: with one line on standard error if anything was wrong, and an exit code.

Exit codes: 0 done; 2 bad input; 75 interrupted after saving, so that it can be started again; 1 anything else.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np

from fvq_jax.runtime.errors import InputError, NonFiniteError, RunError
from fvq_jax.runtime.hosts import rows_of_all_hosts

BAD_INPUT, INTERRUPTED, FAILED = 2, 75, 1

# Words in the errors of collectives and of JAX's coordination service when another process has gone.
_OTHERS = re.compile(r"Gloo|NCCL|Connection (reset|closed)|UNAVAILABLE|heartbeat|Barrier|coordination service")
_KILLED = (
    "fvq_jax: process {} on {} was ended from outside: another process of the run fell silent, or this one was killed; "
    "start all of them again"
)
_LAST = 1.0  # seconds that the first process waits, so that it leaves after the others
_LISTENER = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"


def run(program: Callable[[], int], join: Callable[[], None] | None = None) -> int:
    """Runs a program and returns its exit code. An error that a user can act on becomes one line and a code.

    Args:
      program: does the work and returns the exit code.
      join: called first, makes this process one of several, see `processes.Place.join`; None if it runs alone.

    Returns:
      The exit code. After an error that leaves threads or other processes hanging (`RunError`, or a collective that
      fails because another process has gone) it does not return: the process ends at once, since the interpreter would
      wait for them. `NonFiniteError` is found by all processes at the same step, so that none has to leave early.
    """
    try:
        with contextlib.ExitStack() as stack:
            if join is not None:
                join()
                stack.enter_context(last_words(_KILLED.format(jax.process_index(), socket.gethostname())))
            return program()
    except InputError as error:
        return fail(str(error), BAD_INPUT)
    except NonFiniteError as error:
        return fail(str(error), FAILED)
    except RunError as error:
        _leave(str(error), together=error.shared)
    except Exception as error:
        if missing := missing_platform():
            return fail(missing, BAD_INPUT)
        if jax.process_count() == 1 or not _OTHERS.search(str(error)):
            raise
        _leave(f"lost another process of this run: {str(error).strip().splitlines()[0]}; start all of them again")


def missing_platform() -> str:
    """Why JAX cannot start on the platform that was asked for, in one line; empty if it can."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        asked = jax.config.values["jax_platforms"]
        said = next(iter(str(error).splitlines()), "") or "this installation of JAX has none of them"
        return (
            f"JAX cannot start on JAX_PLATFORMS={asked}: {said}; unset it to take what is there, or install JAX for "
            f"that platform (README.md)"
        )
    return ""


def fail(message: str, code: int = BAD_INPUT) -> int:
    """Writes the message as one line on standard error; returns the exit code."""
    sys.stderr.write(f"fvq_jax: {' '.join(message.split())}\n")
    return code


def _leave(message: str, *, together: bool = False) -> NoReturn:
    """Ends the program at once, without waiting for threads and processes that may hang.

    `together` says that all processes of the run call this. The first process then ends last, since it holds the
    service through which JAX watches the others, and that service kills processes that outlive it.
    """
    fail(message)
    sys.stdout.flush()
    if together:
        rows_of_all_hosts(np.zeros(1, np.int32))
        time.sleep(_LAST if jax.process_index() == 0 else 0)
    os._exit(FAILED)


@contextlib.contextmanager
def last_words(line: str) -> Iterator[None]:
    """If this process is killed inside the block, a small process beside it writes `line` to standard error.

    When another process of a run falls silent, a thread of JAX ends this one with a stack trace, and when memory runs
    out the kernel ends it: in both cases it has no chance to write a line itself.
    """
    command = [sys.executable, "-S", "-c", _LISTENER, line + "\n"]
    # In a session of its own, since a signal that ends this process may be sent to its whole process group.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True) as listener:
        try:
            yield
        finally:
            listener.communicate("unneeded")
