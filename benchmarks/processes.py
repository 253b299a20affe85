"""Competing programs, each in a process of its own, timed in turn, with their peak memory; tables of the results.

What runs is left to the benchmarks of this folder. A program is a function `load(*arguments)` that imports what it
needs, brings its inputs into memory, compiles, and returns `build`; `build()` makes what the program keeps beside its
inputs (an index, a network) and returns {name: function without arguments}, which are what is timed. Memory counts
from before `build`. Linux only: the memory of a process is read from /proc.
"""

import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fvq_jax.runtime.allocation import has_accelerator

MIB, GIB = 2**20, 2**30
PAUSE = 0.3  # seconds before a run: idle threads of the program before it spin for up to 0.2
OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|allocate memory|bad_alloc|RESOURCE_EXHAUSTED", re.IGNORECASE
)

# JAX takes memory of a GPU as it needs it, since programs share it, and as much as the others may: nearly all.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name, and JAX refuses to have both
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")


class DoesNotFitError(Exception):
    """A program needs more memory than is free; the text says how much that is."""


class Timed(NamedTuple):
    """One run: how long it took, and what it returned."""

    seconds: float
    answer: Any


class HostMemory:
    """Resident memory of this process beyond that at `start`, in MiB."""

    def start(self) -> None:
        """Counts from here; lets no allocation exceed what is free now, so that other programs are safe."""
        ctypes.CDLL(None).malloc_trim(0)
        self.before = self._read("VmRSS")
        limit = int(self._read("VmSize") * MIB + 0.9 * _free_bytes())
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def now(self) -> float:
        """What is held now; forgets the peak so far."""
        Path("/proc/self/clear_refs").write_text("5")
        return self._read("VmRSS") - self.before

    def peak(self) -> float:
        """The most since `now`."""
        return self._read("VmHWM") - self.before

    def settle(self) -> None:
        """The first run is over; it counts."""

    def _read(self, name):
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class JaxMemory:
    """Memory of the first accelerator, as JAX counts it. Its peak cannot be set back: it includes `load`."""

    def __init__(self, device: Any):
        self.device = device

    def start(self) -> None:
        """Counts from here."""
        self.before = self.device.memory_stats()["bytes_in_use"]

    def now(self) -> float:
        """What is held now."""
        return (self.device.memory_stats()["bytes_in_use"] - self.before) / MIB

    def peak(self) -> float:
        """The most so far."""
        return (self.device.memory_stats()["peak_bytes_in_use"] - self.before) / MIB

    def settle(self) -> None:
        """The first run is over; it counts."""


class TorchMemory:
    """Memory of the first GPU, as PyTorch counts it."""

    def __init__(self, cuda: Any):
        self.cuda = cuda

    def start(self) -> None:
        """Counts from here."""
        self.before = self.cuda.memory_allocated()

    def now(self) -> float:
        """What is held now; forgets the peak so far."""
        self.cuda.reset_peak_memory_stats()
        return (self.cuda.memory_allocated() - self.before) / MIB

    def peak(self) -> float:
        """The most since `now`."""
        return (self.cuda.max_memory_allocated() - self.before) / MIB

    def settle(self) -> None:
        """The first run is over; forgets what compiling and the choice of algorithms took in it."""
        self.cuda.reset_peak_memory_stats()


def _memory_of(framework: str) -> HostMemory | JaxMemory | TorchMemory:
    if framework == "jax":
        import jax

        device = jax.local_devices()[0]
        return HostMemory() if device.platform == "cpu" else JaxMemory(device)
    if framework == "torch":
        import torch

        return TorchMemory(torch.cuda) if torch.cuda.is_available() else HostMemory()
    return HostMemory()


class Worker:
    """A program in a process of its own, loaded, built and run once untimed when this returns.

    `framework` (jax, torch or another name) says whose memory counts. DoesNotFitError if memory runs out, also from
    `run`; RuntimeError if the program fails, with the traceback on standard error.
    """

    def __init__(self, framework: str, load: Callable, *arguments: Any):
        self.limit = "the memory of the GPU or TPU" if has_accelerator() else f"{_free_bytes() / GIB:.1f} GiB"
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, framework, load, arguments), daemon=True)
        self._process.start()
        end.close()
        self.held = self._answer()  # MiB after `build`

    def run(self, name: str) -> Timed:
        """Runs the function of that name, waiting for its result."""
        self._pipe.send(name)
        return self._answer()

    def peak(self) -> float:
        """Peak memory in MiB over all runs so far."""
        self._pipe.send("peak")
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()

    def _answer(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            if self._process.exitcode in (-signal.SIGKILL, -signal.SIGABRT):  # a process ends so when memory runs out
                answer = DoesNotFitError()
            else:
                raise RuntimeError(f"a benchmark process ended with code {self._process.exitcode}") from None
        if isinstance(answer, DoesNotFitError):
            raise DoesNotFitError(f"does not fit in {self.limit}")
        return answer


def _serve(pipe, framework, load, arguments):
    """The process of a `Worker`."""
    with contextlib.suppress(OSError):  # should memory run out all the same, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        build = load(*arguments)
        memory = _memory_of(framework)
        memory.start()
        runs = build()
        held = memory.now()
        next(iter(runs.values()))()
        memory.settle()
        pipe.send(held)
        for name in iter(pipe.recv, None):
            if name == "peak":
                pipe.send(memory.peak())
                continue
            start = time.perf_counter()
            answer = runs[name]()
            pipe.send(Timed(time.perf_counter() - start, answer))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        pipe.send(DoesNotFitError())


def alternate(workers: dict[str, Worker], runs: Iterable[str], rounds: int, budget: float = math.inf) -> dict:
    """Runs everything in turn, `rounds` times, or fewer (at least 2) once `budget` seconds have gone.

    Returns the seconds of every round by (worker, run).
    """
    seconds = {(name, run): [] for name in workers for run in runs}
    started = time.monotonic()
    for done in range(rounds):
        if done >= 2 and time.monotonic() - started > budget:
            break
        for name, run in seconds:
            time.sleep(PAUSE)
            seconds[name, run].append(workers[name].run(run).seconds)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median over rounds of a / b: within a round, a machine whose speed drifts is equally fast for both.

    If one of them had fewer rounds, since it ran alone, the ratio of the medians.
    """
    if len(a) != len(b):
        return statistics.median(a) / statistics.median(b)
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def machine() -> dict[str, Any]:
    """What goes beside every figure: processor, cores, memory, and how busy the machine is now."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    name = model[1] if model else os.uname().machine
    return {"machine": f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB", "load": round(os.getloadavg()[0], 1)}


def markdown_table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a table in Markdown; `columns` maps keys to headings, and what a row lacks stays empty."""

    def line(cells):
        return "| " + " | ".join(cells) + " |\n"

    body = (line("" if row.get(key) is None else str(row[key]) for key in columns) for row in rows)
    return line(columns.values()) + line("---" for _ in columns) + "".join(body)


def write_rows(rows: Iterable[dict], columns: dict[str, str], markdown: bool) -> list[dict]:
    """Writes the rows as JSON objects, each as soon as it is known, then as a table if wanted; returns them.

    The table leaves out columns that no row has.
    """
    written = []
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        written.append(row)
    if markdown:
        used = {key: text for key, text in columns.items() if any(row.get(key) not in (None, "") for row in written)}
        sys.stdout.write("\n" + markdown_table(written, used))
    return written


def _free_bytes() -> int:
    """Memory that programs could still take without swapping."""
    return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
