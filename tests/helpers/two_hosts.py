"""Several hosts on one machine: threads that meet only in `fvq_jax.runtime.hosts`, or real processes."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from fvq_jax.runtime import hosts

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 100  # after which a host that waits for the other gives up


def free_port() -> int:
    """A port for a coordinator."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_host(index: int, count: int, port: int, *arguments: str) -> subprocess.Popen:
    """Starts Python with these arguments, as process `index` of `count`, with as many devices as this one has."""
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True)


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
