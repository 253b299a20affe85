"""Starts the training program many times, cheaply, to be ended in all the ways in which a run can end."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import jax

from tests.helpers.quick_compile import FLAGS
from tests.helpers.tiny_generator import CLASSES, GRID, VOCAB

ROOT = pathlib.Path(__file__).parents[2]
Flags = Sequence[str]
SMALLEST: Flags = (
    "--config=configs/fvq16k.py:smoke",
    "--config.tokenizer.ch_mult=(1,)",
    "--config.tokenizer.quantizer.codebook_size=64",
    "--config.tokenizer.quantizer.bridge=XS/2-d1",
    "--config.tokenizer.dtype=float32",
    "--config.adversarial.weight=0.0",
    "--config.data.image_size=16",
    "--config.eval.images=8",
)
SMALLEST_GENERATOR: Flags = (  # on the codes of `tiny_generator.write_splits`
    f"--config=configs/llamagen.py:smoke,vocab={VOCAB}",
    f"--config.generator.classes={CLASSES}",
    f"--config.generator.grid={','.join(map(str, GRID))}",
    "--config.generator.dtype=float32",
    "--config.optim.ema_decay=0.9",
)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"} | {
    "XLA_FLAGS": " ".join(FLAGS),  # one device: the eight simulated ones of the suite are not needed
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
PATIENCE = 300  # seconds for what takes a few, on a machine that does much else

# Imports what the program imports, then lets copies of itself become the program.
_PREPARED = """
import json, os, runpy, sys
import fvq_jax.training.loop, absl.app, ml_collections.config_flags

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        for stream, name in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
        os.environ.update(job["environment"])
        sys.argv = ["fvq_jax.main", *job["args"]]
        runpy.run_module("fvq_jax.main", run_name="__main__", alter_sys=True)
        sys.exit()
    print(child, flush=True)
"""


class Prepared:
    """A process that starts the program without the seconds that importing takes.

    `world` is a module that changes what Python says of the world, imported before anything else; `environment` is
    beside ENVIRONMENT, for what is read when JAX is imported.
    """

    def __init__(self, folder: pathlib.Path, always: Flags = SMALLEST, *, world: str = "sys", **environment: str):
        self._folder, self._always = folder, always
        self._count = 0
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [sys.executable, "-c", f"import {world}\n{_PREPARED}"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | environment, **pipes)

    def start(self, *args: str, **environment: str) -> "Program":
        self._count += 1
        out, err = (self._folder / f"{name}{self._count}" for name in ("out", "err"))
        err.touch()
        job = {"args": [*self._always, *args], "environment": environment, "out": str(out), "err": str(err)}
        return Program(self, int(self.ask(job)), out, err)

    def ask(self, job: dict) -> str:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate(timeout=300)


@dataclasses.dataclass
class Program:
    """One start of the program."""

    prepared: Prepared
    pid: int
    out: pathlib.Path
    err: pathlib.Path

    def said(self) -> str:
        return self.err.read_text()

    def wait_for(self, happened, *, every: float = 0.05) -> bool:
        """Whether `happened()` became true before the program ended; looks every so many seconds."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return happened()
            assert time.monotonic() < deadline, self.said()
            time.sleep(every)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        """Waits; the exit code and the last line of the program itself, after which libraries may clean up."""
        code = int(self.prepared.ask({"wait": self.pid}))
        return code, ([line for line in self.said().splitlines() if line.startswith("fvq_jax: ")] or [""])[-1]
