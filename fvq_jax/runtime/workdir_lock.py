"""One process per workdir: a lock on `workdir/lock`, which the system releases when its holder ends in any way."""

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from fvq_jax.runtime.errors import InputError

FILE = "lock"
PATIENCE = 5.0  # seconds: a killed process holds its lock until all its memory has been freed
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other processes, also on other hosts, from holding the same workdir.

    If the file system has no locks, a log line says so and nothing is held.

    Raises:
      InputError: another process holds the workdir (the message names it), or the workdir cannot be written.
    """
    path = workdir / FILE
    try:
        file = path.open("a+")  # not inherited by programs that this one starts, which must not hold the lock
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from None
    with file:
        if _lock(file.fileno(), workdir):
            since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
                file.flush()
            except OSError as error:
                raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from None
        yield


def _lock(descriptor: int, workdir: Path) -> bool:
    """Takes the lock; False if the file system has no locks. Raises InputError if another process keeps the lock."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = (workdir / FILE).read_text().strip() or "another process"
                raise InputError(f"workdir {workdir} is in use by {holder}: use another workdir") from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise InputError(f"workdir {workdir} cannot be locked: {error.strerror or error}") from None
            logging.warning("the file system of %s has no locks: start only one run there at a time", workdir)
            return False
