"""Signs of life of one process of a run: `workdir/heartbeat/host_NNN.json`.

If the `time` in the file lies further back than the slowest step takes, the run is stuck in the phase that the file
names. The files are for people and schedulers: no program of this package reads them.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from fvq_jax.runtime.clock import wall
from fvq_jax.runtime.files import replace_whole

HEARTBEATS = "heartbeat"


class Heartbeat:
    """Writes `{"step", "phase", "time", "pid", "host"}`: at each new phase, else at most every `every` seconds.

    `time` is in seconds since 1970, by `wall`, a clock that may be set back; `clock` is one for durations. Files are
    replaced whole, so that no reader sees half of one.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        process_index: int,
        *,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = wall,
    ):
        self._path = Path(workdir) / HEARTBEATS / f"host_{process_index:03d}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._every = every
        self._clock, self._wall = clock, wall
        self._who = {"pid": os.getpid(), "host": socket.gethostname()}
        self._last = self._written = clock()
        self._longest = 0.0
        self._phase = ""

    def beat(self, step: int, phase: str) -> None:
        """Notes that the process lives, has done `step` steps and is in `phase`: compiling, training, saving, ..."""
        now = self._clock()
        self._longest, self._last = max(self._longest, now - self._last), now
        if phase != self._phase or now - self._written >= self._every:
            self._phase, self._written = phase, now
            with replace_whole(self._path) as unfinished:
                unfinished.write_text(
                    json.dumps({"step": step, "phase": phase, "time": self._wall(), **self._who}) + "\n"
                )

    def longest_silence(self) -> float:
        """The longest time between two beats since the last call, in seconds."""
        longest, self._longest = self._longest, 0.0
        return longest
