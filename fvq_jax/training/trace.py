"""A trace of chosen steps on demand, for TensorBoard's profiler or Perfetto: `workdir/profile`."""

import os
import re
from pathlib import Path
from typing import Any

import jax
from absl import logging

from fvq_jax.runtime.errors import InputError


def parse_steps(text: str) -> tuple[int, int] | None:
    """`"10:20"` as (10, 20), `""` as None; InputError for anything else."""
    if not text:
        return None
    if not re.fullmatch(r"\d+:\d+", text):
        raise InputError(f"--profile_steps={text} is not FIRST:LAST, for instance 10:20")
    first, last = map(int, text.split(":"))
    if not 1 <= first <= last:
        raise InputError(f"--profile_steps={text} does not satisfy 1 <= FIRST <= LAST")
    return first, last


class Trace:
    """Traces the steps `first` to `last`, both included; those already done when the run resumes are not traced."""

    def __init__(self, workdir: str | os.PathLike[str], steps: tuple[int, int] | None):
        self._folder = Path(workdir) / "profile"
        self._steps = steps
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """To be called before `step` is started."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """To be called after `step` was started; if it is the last one, waits until its `result` has been traced."""
        if self._steps and self._running and step >= self._steps[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            logging.info("trace in %s", self._folder)
