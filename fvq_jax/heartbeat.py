"""Signs of life of one process of a run: `workdir/heartbeat/host_NNN.json`, and the log of that host.

A watcher that finds `time` older than the slowest step it knows of looks at a run that is stuck; `phase` says in what.
The files are for people and schedulers: no program of this package reads them.
"""

import contextlib
import json
import logging as std_logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

LOGS, HEARTBEATS = "logs", "heartbeat"


class Heartbeat:
    """Writes `{"step", "phase", "time", "pid", "host"}`, at most every `every` seconds unless the phase changes.

    `time` is in seconds since 1970. Files are replaced whole, so that no reader sees half of one.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        process_index: int,
        *,
        every: float = 5.0,
        clock: Callable[[], float] = time.time,
    ):
        self._path = Path(workdir) / HEARTBEATS / f"host_{process_index:03d}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._every = every
        self._clock = clock
        self._who = {"pid": os.getpid(), "host": socket.gethostname()}
        self._last = self._written = clock()
        self._longest = 0.0
        self._phase = ""

    def beat(self, step: int, phase: str) -> None:
        """The process lives, has done `step` steps, and is now in `phase`: compiling, training, saving, ..."""
        now = self._clock()
        self._longest, self._last = max(self._longest, now - self._last), now
        if phase != self._phase or now - self._written >= self._every:
            self._phase, self._written = phase, now
            unfinished = self._path.with_suffix(".tmp")
            unfinished.write_text(json.dumps({"step": step, "phase": phase, "time": now, **self._who}) + "\n")
            unfinished.replace(self._path)

    def longest_silence(self) -> float:
        """The longest time between two beats since the last call, in seconds."""
        longest, self._longest = self._longest, 0.0
        return longest


@contextlib.contextmanager
def host_log(workdir: str | os.PathLike[str], process_index: int) -> Iterator[None]:
    """What is logged inside goes to `workdir/logs/host_NNN.log` as well, and so does the error that ends it."""
    path = Path(workdir) / LOGS / f"host_{process_index:03d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = std_logging.FileHandler(path, delay=True)
    shown = logging.get_absl_handler()
    handler.setFormatter(shown.formatter)
    for keep in shown.filters:
        handler.addFilter(keep)
    root = std_logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        line = std_logging.LogRecord(
            "fvq_jax", std_logging.ERROR, __file__, 0, "%s: %s", (type(error).__name__, error), None
        )
        handler.handle(line)
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
