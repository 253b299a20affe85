"""One line for a process that is ended from outside Python.

When another process of a run falls silent, JAX ends this one from a thread of its own, with a stack trace and no way
to say anything; the kernel does as much when memory runs out.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_LISTENER = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"


@contextlib.contextmanager
def last_words(line: str) -> Iterator[None]:
    """Has `line` written to standard error, by a small process beside this one, if this one ends inside."""
    command = [sys.executable, "-S", "-c", _LISTENER, line + "\n"]
    # In a session of its own, since what ends this process by a signal may be meant for all of its group.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True) as listener:
        try:
            yield
        finally:
            listener.communicate("unneeded")
