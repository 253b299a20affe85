"""How every program of this package ends: with one line on standard error if anything was wrong, and an exit code.

Exit codes: 0 done; 2 bad input; 75 interrupted after saving, so that it can be started again; 130 ended by Ctrl-C
(SIGINT) and 143 by SIGTERM where nothing can go on, as shells count them; 1 anything else.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from fvq_jax.runtime import starting
from fvq_jax.runtime.errors import InputError, NonFiniteError, RunError
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.libtpu import say_that_there_is_none

BAD_INPUT, INTERRUPTED, FAILED = 2, 75, 1
_BY_SIGNAL = 128  # plus the number of the signal that ended a program
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory")

# Words in the errors of collectives and of JAX's coordination service when another process has gone.
_OTHERS = re.compile(r"Gloo|NCCL|Connection (reset|closed)|UNAVAILABLE|heartbeat|Barrier|coordination service")
_REMEDY = "take fewer or smaller pictures at once (--batch, or batch_size in a config), or a machine with more memory"
_KILLED = (
    "fvq_jax: process {} on {} was ended from outside: another process of the run fell silent, or this one was killed; "
    "start all of them again"
)
_SOON = 0.05  # seconds until a signal that was ignored comes again
_LAST = 1.0  # seconds that the first process waits, so that it leaves after the others
_LISTENER = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"


class Ended(KeyboardInterrupt):
    """SIGTERM, raised as Python raises SIGINT, so that files are closed and temporary ones removed."""


def run(
    program: Callable[[], int],
    join: Callable[[], None] | None = None,
    *,
    kept: str = "nothing was written",
    resumes: bool = False,
) -> int:
    """Runs a program and returns its exit code. An error that a user can act on becomes one line and a code.

    Args:
      program: does the work and returns the exit code.
      join: called first, makes this process one of several, see `processes.Place.join`; None if it runs alone.
      kept: what there is after a signal (SIGINT, SIGTERM) that the program does not handle itself.
      resumes: whether the program, started again after such a signal, goes on: the exit code is then INTERRUPTED.

    Returns:
      The exit code. After an error that leaves threads or other processes hanging (`RunError`, or a collective that
      fails because another process has gone) it does not return: the process ends at once, since the interpreter would
      wait for them. `NonFiniteError` is found by all processes at the same step, so that none has to leave early.
    """
    starting.done()
    say_that_there_is_none()
    try:
        with contextlib.ExitStack() as stack:
            if join is not None:
                join()
                stack.enter_context(last_words(_KILLED.format(jax.process_index(), socket.gethostname())))
            stack.enter_context(_sigterm_raises())
            stack.enter_context(_ignored_interrupts_come_again())
            return program()
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Ended) else signal.SIGINT
        code = INTERRUPTED if resumes else _BY_SIGNAL + number
        return _end(f"interrupted by {number.name}: {kept}", code)
    except InputError as error:
        return fail(str(error), BAD_INPUT)
    except NonFiniteError as error:
        return fail(str(error), FAILED)
    except RunError as error:
        _leave(str(error), together=error.shared)
    except Exception as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return _end(f"{_memory_ran_out(error)}: {_REMEDY}", FAILED)
        if missing := missing_platform():
            return fail(missing, BAD_INPUT)
        if jax.process_count() == 1 or not _OTHERS.search(str(error)):
            raise
        _leave(f"lost another process of this run: {str(error).strip().splitlines()[0]}; start all of them again")


def _end(message: str, code: int) -> int:
    """Writes the message and returns the code; one of several processes, which the others wait for, ends at once."""
    fail(message)
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    return code


def _memory_ran_out(error: Exception) -> str:
    """That memory ran out, and what was asked for if the error says so."""
    asked = re.search(r"(?:allocate|allocating) (\d+) bytes|Unable to allocate (\S+ \S+)", str(error))
    return "memory ran out" + (f" when {asked[1] + ' bytes' if asked[1] else asked[2]} were asked for" if asked else "")


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside the block SIGTERM raises `Ended`, unless somebody handles it already or this is not the main thread."""

    def end(number: int, frame: object) -> NoReturn:
        raise Ended

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _ignored_interrupts_come_again() -> Iterator[None]:
    """Inside the block a signal is not lost where Python ignores what is raised, as in a callback of its collector."""
    before = sys.unraisablehook

    def ignored(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            before(what)
            return
        number = signal.SIGTERM if issubclass(what.exc_type, Ended) else signal.SIGINT
        # A little later, for here it would be ignored again.
        again = threading.Timer(_SOON, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = before


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
