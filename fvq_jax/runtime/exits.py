"""How every program of this package ends: with one line on standard error if anything was wrong, and an exit code.

0: done. 2: bad input. 75: interrupted and saved, start it again. 1: anything else.
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

# What stands in the errors of collectives and of JAX's coordination service when another process has gone.
_OTHERS = re.compile(r"Gloo|NCCL|Connection (reset|closed)|UNAVAILABLE|heartbeat|Barrier|coordination service")
_KILLED = (
    "fvq_jax: process {} on {} was ended from outside: another process of the run fell silent, or this one was killed; "
    "start all of them again"
)
_LAST = 1.0  # seconds by which the first process leaves after the others
_LISTENER = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"


def run(program: Callable[[], int], join: Callable[[], None] | None = None) -> int:
    """Runs a program to its exit code. Whatever it raises that a user can act on becomes one line and a code.

    Args:
      program: does the work and returns the exit code.
      join: makes this one of several processes first, see `processes.Place.join`; None for a process that is alone.

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
        if jax.process_count() == 1 or not _OTHERS.search(str(error)):
            raise
        _leave(f"lost another process of this run: {str(error).strip().splitlines()[0]}; start all of them again")


def fail(message: str, code: int = BAD_INPUT) -> int:
    """Writes the message as one line on standard error; returns the exit code."""
    sys.stderr.write(f"fvq_jax: {' '.join(message.split())}\n")
    return code


def _leave(message: str, *, together: bool = False) -> NoReturn:
    """Ends the program at once, without waiting for threads and processes that may hang.

    With `together` all processes of the run are here. The first one holds the service through which JAX watches the
    others, and which kills those that outlive it; so it goes last.
    """
    fail(message)
    sys.stdout.flush()
    if together:
        rows_of_all_hosts(np.zeros(1, np.int32))
        time.sleep(_LAST if jax.process_index() == 0 else 0)
    os._exit(FAILED)


@contextlib.contextmanager
def last_words(line: str) -> Iterator[None]:
    """Has `line` written to standard error, by a small process beside this one, if this one is killed inside.

    When another process of a run falls silent, JAX ends this one from a thread of its own, with a stack trace and no
    way to say anything; the kernel does as much when memory runs out.
    """
    command = [sys.executable, "-S", "-c", _LISTENER, line + "\n"]
    # In a session of its own, since a signal that ends this process may be meant for all of its group.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True) as listener:
        try:
            yield
        finally:
            listener.communicate("unneeded")
