"""Runs points of a sweep, each as a process of its own, and keeps their records.

A point that fails does not stop the others. A run that a killed sweep had begun goes on from its checkpoint next time.
"""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.exits import BAD_INPUT, INTERRUPTED
from fvq_jax.runtime.interrupt import Interrupt
from fvq_jax.sweep.points import LOG, OUTPUT, Point, Status, is_finished, read_record, try_lock, write_record
from fvq_jax.tasks import TASKS

POLL_SECONDS = 0.1
# A scheduler may signal every process of a job, and a run that gets the same signal twice ends before it has saved
# (`Interrupt`). So the sweep passes on the other of the two signals.
PASSED_ON = {signal.SIGTERM: signal.SIGINT, signal.SIGINT: signal.SIGTERM}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a point stands when the sweep ends; `ran` is whether this sweep ran it."""

    point: Point
    status: Status
    ran: bool = False
    exit_code: int | None = None
    error: str = ""
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Where the run's own lines are."""
        return self.point.workdir / LOG


@dataclasses.dataclass
class _Running:
    """A process, and what it was given."""

    point: Point
    process: subprocess.Popen[bytes]
    lock: int
    log_start: int


def run_points(points: Sequence[Point], command: Callable[[Point], list[str]], parallel: int = 1) -> list[Outcome]:
    """Runs the points, `parallel` at a time, except those that are finished, refused or run by another program.

    SIGTERM and SIGINT are passed on to the runs, which save and end; what has not begun then stays `waiting`.

    Args:
      points: the points, run in this order.
      command: what runs a point: a program that behaves as `fvq_jax.main`.
      parallel: how many at a time.

    Returns:
      One outcome per point, in the order in which they ended.

    Raises:
      InputError: a workdir cannot be written.
    """
    waiting = collections.deque(points)
    running: list[_Running] = []
    outcomes: list[Outcome] = []
    for point in points:
        _announce(point)
    with Interrupt() as interrupt, _Progress(len(points)) as progress:
        try:
            passed_on = False
            while running or waiting:
                while waiting and len(running) < parallel and interrupt.signal is None:
                    begun = _begin(waiting.popleft(), command)
                    if isinstance(begun, Outcome):
                        progress.ended(begun)
                        outcomes.append(begun)
                    else:
                        running.append(begun)
                        progress.began(begun.point)
                if interrupt.signal is not None and not passed_on:
                    passed_on = True
                    logging.warning("%s: stopping %d runs, which save first", interrupt.signal.name, len(running))
                    for run in running:
                        run.process.send_signal(PASSED_ON[interrupt.signal])
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    outcomes.append(_end(run, stopping=passed_on))
                    progress.ended(outcomes[-1])
                if passed_on and not running:
                    break
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for run in running:
                run.process.kill()
    return outcomes + [Outcome(point, "waiting") for point in waiting]


def _announce(point: Point) -> None:
    """Leaves a record for a report to show, if there is none."""
    try:
        point.workdir.mkdir(parents=True, exist_ok=True)
        lock = try_lock(point.workdir)
        if lock is not None:
            if read_record(point.workdir) is None:
                write_record(point, "waiting")
            os.close(lock)
    except OSError as error:
        raise InputError(f"{point.workdir} cannot be used: {error.strerror or error}") from error


def _begin(point: Point, command: Callable[[Point], list[str]]) -> _Running | Outcome:
    lock = try_lock(point.workdir)
    if lock is None:
        return Outcome(point, "elsewhere")
    if is_finished(point) or point.refused:
        outcome = Outcome(point, "finished")
        if point.refused:
            outcome = Outcome(point, "refused", exit_code=BAD_INPUT, error=point.refused)
            write_record(point, "refused", exit_code=BAD_INPUT, error=point.refused)
        os.close(lock)
        return outcome
    write_record(point, "running")
    with (point.workdir / OUTPUT).open("wb") as output, (point.workdir / LOG).open("ab") as log:
        start = log.tell()  # taken before the run can write, since the run shares the position
        # A session of its own: Ctrl-C at a terminal reaches the sweep alone, which passes it on once.
        process = subprocess.Popen(
            command(point), stdin=subprocess.DEVNULL, stdout=output, stderr=log, pass_fds=[lock], start_new_session=True
        )
        return _Running(point, process, lock, start)


def _end(run: _Running, stopping: bool) -> Outcome:
    point, code = run.point, run.process.returncode
    summary, error = _summary((point.workdir / OUTPUT).read_text(errors="replace")), ""
    meanings: dict[int, Status] = {0: "finished", BAD_INPUT: "refused", INTERRUPTED: "interrupted"}
    status = meanings.get(code, "failed")
    if stopping and code in (-signal.SIGINT, -signal.SIGTERM):
        status = "interrupted"  # the signal came before the run could handle it
    if status == "finished" and not summary:
        status, error = "failed", "it ended without a result line"
    elif status in ("failed", "refused"):
        error = _last_error(point.workdir / LOG, run.log_start)
        if code < 0:
            error = f"killed by {signal.Signals(-code).name}" + (f" after: {error}" if error else "")
    summary = summary if status == "finished" else {}
    write_record(point, status, exit_code=code, error=error, summary=summary)
    os.close(run.lock)
    return Outcome(point, status, ran=True, exit_code=code, error=error, summary=summary)


def _summary(text: str) -> dict[str, Any]:
    """The result line: the last one, one JSON object; {} if it is something else."""
    try:
        found = json.loads(text.splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_error(log: Path, start: int) -> str:
    """The last line about an error ("fvq_jax: ...") that the run has written, or else its last line."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("fvq_jax: ") for line in lines if line.startswith("fvq_jax: ")]
    return (own or lines or [""])[-1]


class _Progress:
    """Says on standard error which points have ended: a line for each, and a bar if it is a terminal."""

    def __init__(self, total: int):
        self._total, self._ended = total, 0
        self._bar = tqdm(total=total, unit="point", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def began(self, point: Point) -> None:
        """A run was started."""
        self._say(logging.INFO, "started %s, log: %s", point.name, point.workdir / LOG)

    def ended(self, outcome: Outcome) -> None:
        """One more point is done, for this sweep."""
        self._ended += 1
        done, name = f"{self._ended}/{self._total}", outcome.point.name
        if outcome.status in ("failed", "refused"):
            words = (f"exit code {outcome.exit_code}", outcome.error)
            log = f"; log: {outcome.log}" if outcome.ran else ""
            self._say(logging.WARNING, "%s %s: %s (%s)%s", done, outcome.status, name, ": ".join(words), log)
        else:
            before = "" if outcome.ran or outcome.status != "finished" else " before"
            names = (*TASKS[outcome.point.config.get("task", "tokenizer")].scores, "seconds")
            figures = {name: outcome.summary.get(name) for name in names}
            text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
            self._say(logging.INFO, "%s %s%s: %s%s", done, outcome.status, before, name, f" ({text})" if text else "")
        self._bar.update()

    def _say(self, level: int, message: str, *words: object) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            logging.log(level, message, *words)
