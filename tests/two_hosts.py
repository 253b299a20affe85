"""Two hosts as two threads of one process, for tests of what hosts put together through `fvq_jax.evals.hosts`."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from fvq_jax.evals import hosts

SECONDS = 100  # after which a host that waits for the other gives up


def on_two_hosts(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], Any]) -> list[Any]:
    """What `work(index)` returns on each of two hosts."""
    here, meeting, brought = threading.local(), threading.Barrier(2, timeout=SECONDS), [None, None]

    def gather(flat):
        brought[here.index] = flat.copy()
        meeting.wait()
        gathered = np.stack(brought)
        meeting.wait()  # before either brings something else
        return gathered

    def run(index):
        here.index = index
        try:
            return work(index)
        except BaseException:
            meeting.abort()
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(jax, "process_index", lambda: here.index)
        patch.setattr(hosts, "_gather", gather)
        ends = [threads.submit(run, index) for index in range(2)]
        for end in ends:
            error = end.exception()
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [end.result() for end in ends]
