"""The training loop, shared by every task: data in, steps, logs, evaluation, checkpoints, report.

`step` and the task define what a step computes; `run` makes the parts of a run and checks them before it starts.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fvq_jax.data.prefetch import Prefetch
from fvq_jax.runtime import chips, clock
from fvq_jax.runtime.agreement import check_same, everywhere, gather_texts
from fvq_jax.runtime.errors import InputError, NonFiniteError
from fvq_jax.runtime.heartbeat import Heartbeat
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.interrupt import Interrupt
from fvq_jax.runtime.logs import host_log
from fvq_jax.runtime.mesh import global_batch
from fvq_jax.runtime.products import product_flops
from fvq_jax.runtime.storage import storage_errors
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.metric_files import MetricWriter
from fvq_jax.training.progress import Progress
from fvq_jax.training.run import Run, check_record, log_start, note_start, prepare
from fvq_jax.training.state import TrainState, create_state, with_params
from fvq_jax.training.step import StepMetrics
from fvq_jax.training.step_timer import StepTimer
from fvq_jax.training.task import Evaluation, Task
from fvq_jax.training.trace import Trace

MOST_SKIPPED = 100  # steps in a row that `on_nan=skip` passes over; then the run would only go on to its end in vain
AGREE_EVERY = 5  # steps between two checks whether any process has to stop; each check waits for all of them
_WHEN_TOLD = "the run saves and ends as soon as what is under way (compiling, a step, saving) is done"


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: `summary` is what main prints; if `interrupted`, the run was saved before its last step."""

    summary: dict[str, Any]
    interrupted: bool = False


def train(
    task_class: type[Task],
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    profile_steps: tuple[int, int] | None = None,
) -> Result:
    """Trains a task from the newest checkpoint in `workdir`, or from the start, to the last step; then evaluates.

    Stopping at any step and calling again gives, on the same devices, bit for bit the weights of a run without a stop.

    Raises:
      InputError: before anything compiles, if config, data, weights or workdir cannot work; later, if too
        many files turn out to be unreadable; what was done until then is saved.
      NonFiniteError: a loss or gradient norm is not finite and `on_nan` is "stop", or so many steps in a row were
        skipped that no later one is likely to be finite. Nothing of these steps is kept.
      StorageError: a checkpoint or a log could not be written.
      DataError: no batch came for `data.timeout` seconds, or a data worker has died.
    """
    started = time.monotonic()
    keep = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(_WHEN_TOLD))  # first: a signal during preparation is not lost
        stack.enter_context(storage_errors(Path(workdir).expanduser().absolute()))
        check_same({"config": config.to_dict()})
        run = everywhere(lambda: prepare(task_class, config, workdir, stack))
        stack.enter_context(host_log(run.workdir, jax.process_index()))
        log_start(run)
        checkpoints = stack.enter_context(Checkpoints(run.workdir, **keep))
        pictures = {split: run.task.source(split).fingerprint() for split in ("train", "eval")}
        check_same({"checkpoint": checkpoints.latest_step(), "pictures": pictures})
        if checkpoints.latest_step() is None:
            state, record = create_state(run.step.init, config.seed, run.step.abstract()), {}
            if run.init_params is not None:
                state = with_params(state, run.task.main, run.init_params)
        else:
            restored = checkpoints.restore(run.step.abstract())
            state, record = restored.state, restored.record
            check_record(run, record, int(state.step))
        step = int(state.step)
        note_start(run, step, record)
        with (
            MetricWriter(run.workdir, start_step=step, active=run.first) as writer,
            Progress(run.total_steps, step, active=run.first) as progress,
            Trace(run.workdir, profile_steps) as trace,
        ):
            loop = _Loop(run, state, record, started, checkpoints, writer, progress, trace, interrupt)
            try:
                evaluation = loop.run()
            except InterruptedRunError:
                loop.save()
                checkpoints.wait()
                why = interrupt.signal.name if interrupt.signal else "another process was told to stop"
                logging.warning("%s: saved step %d, start me again to go on", why, loop.step)
                return Result({}, interrupted=True)
            except InputError as error:  # unreadable files
                # All processes save, or none.
                if loop.step > step and (jax.process_count() == 1 or error.shared):
                    loop.save()
                    checkpoints.wait()
                    logging.warning("saved step %d", loop.step)
                raise
        run.report(loop.state, evaluation)
        return Result(run.summary(loop.step, evaluation, loop.record()))


class InterruptedRunError(Exception):
    """Leaves the steps or an evaluation when a signal has arrived."""


class _Loop:
    """The steps of one call of `train`, with the logs, checkpoints and evaluations between them."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        record: dict[str, Any],
        started: float,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        progress: Progress,
        trace: Trace,
        interrupt: Interrupt,
    ):
        self.state = state
        self.step = int(state.step)
        self._run, self._config = run, run.config
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._trace, self._interrupt = trace, interrupt
        self._heartbeat = Heartbeat(run.workdir, jax.process_index())
        # Earlier calls are included: `seconds` is the wall time of the whole run.
        self._seconds = record.get("seconds", 0.0)
        self._started = started - self._seconds
        # And the time between two calls: only the clock on the wall knows it, which somebody may have set back.
        now = clock.wall()
        self._began = time.monotonic() - max(self._seconds, now - record.get("began", now))
        self._timed = record.get("timed", {"steps": 0, "seconds": 0.0})
        self._timer = StepTimer(self._config.batch_size)
        self._unchecked: tuple[int, dict[str, jax.Array]] | None = None
        self._skipped_in_a_row = 0
        self._no_batch: InputError | None = None  # why this one of several processes has no more batches
        self._skipped: Mapping[str, Any] = {}
        self._skipped_before = frozenset(record.get("data", {}).get("unreadable", {}).get("names", ()))

    def run(self) -> Evaluation:
        """Does all steps that are left, then the final checkpoint and evaluation."""
        if self.step < self._run.total_steps:
            batches = self._batches()
            try:
                self._steps(batches)
            finally:
                batches.close()
        self.save()
        evaluation = self._evaluate()
        self._checkpoints.wait()
        self._heartbeat.beat(self.step, "done")
        return evaluation

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        timed = self._timed
        rate = timed["steps"] * self._config.batch_size / timed["seconds"] if timed["seconds"] else 0.0
        return {
            "data": self._run.data_position(self.step, self._unreadable_anywhere()),
            "config": json.loads(self._config.to_json()),
            "began": clock.wall() - (time.monotonic() - self._began),  # in seconds since 1970, as the clock is now
            "seconds": self._seconds,
            "timed": timed,
            f"{self._run.task.unit}_per_second": rate,
        }

    def _unreadable_anywhere(self) -> set[str]:
        """The names of the examples that no process could read, in this call and in earlier ones."""
        here = sorted(self._skipped_before.union(self._skipped))
        if jax.process_count() == 1:
            return set(here)
        return {name for text in gather_texts(json.dumps(here)) for name in json.loads(text)}

    def save(self) -> None:
        """Starts a checkpoint of the current step."""
        self._check_finite()
        self._seconds = time.monotonic() - self._started if self.step else 0.0
        self._heartbeat.beat(self.step, "saving")
        with self._timer.paused():
            self._checkpoints.save(self.state, self.step, self.record())

    def _batches(self) -> Prefetch[tuple[dict[str, jax.Array], int]]:
        """Batches on the devices, each with the number of files that had been skipped when it was made."""
        mesh, batches = self._run.mesh, self._run.task.batches(self.step)
        self._skipped = batches.skipped

        def place(batch: dict[str, np.ndarray]) -> tuple[dict[str, jax.Array], int]:
            return global_batch(batch, mesh), len(batches.skipped)

        return Prefetch(batches, place, timeout=self._config.data.timeout)

    def _steps(self, batches: Prefetch[tuple[dict[str, jax.Array], int]]) -> None:
        config, run = self._config, self._run
        batch, skipped_files = everywhere(lambda: next(batches))
        train_step = self._compile(batch)
        counts = None
        self._timer.read()
        while True:
            if self._interrupted():
                raise InterruptedRunError
            self._trace.before(self.step + 1)
            self.state, metrics = train_step(self.state, batch, run.task.frozen)
            self.step += 1
            self._trace.after(self.step, metrics)
            self._heartbeat.beat(self.step, "training")
            self._timer.step()
            counts = metrics.counts if counts is None else jax.tree.map(jnp.add, counts, metrics.counts)
            self._check_finite()  # checks the step before, while this one runs
            self._unchecked = (self.step, metrics.scalars)
            last = self.step == run.total_steps
            if last or self.step % config.log.every_steps == 0:
                self._log(StepMetrics(metrics.scalars, counts), skipped_files)
                counts = None
            else:
                self._progress.update(self.step)
            if last:
                self._agree()
                return
            if self.step % config.checkpoint.every_steps == 0:
                self.save()
            if config.eval.every_steps and self.step % config.eval.every_steps == 0:
                self._evaluate()
            if not batches.ready():
                jax.block_until_ready(metrics.scalars)  # while the devices have work, nothing waits for data
            with self._timer.data():
                batch, skipped_files = self._following(batches, batch, skipped_files)

    def _following(
        self, batches: Prefetch[tuple[dict[str, jax.Array], int]], batch: dict[str, jax.Array], skipped_files: int
    ) -> tuple[dict[str, jax.Array], int]:
        """The batch after `batch`, with its number of skipped files.

        One of several processes that meets too many unreadable files takes the same batch again: the others would wait
        for it in their next step. When they agree the next time, all save and end.
        """
        if self._no_batch is None:
            try:
                return next(batches)
            except InputError as error:
                if jax.process_count() == 1:
                    raise
                self._no_batch = error
        return batch, skipped_files

    def _compile(self, batch: dict[str, jax.Array]) -> jax.stages.Compiled:
        run = self._run
        began = time.monotonic()
        self._heartbeat.beat(self.step, "compiling")
        traced = run.step.jitted(self.state).trace(self.state, batch, run.task.frozen)
        compiled, platform = traced.lower().compile(), run.mesh.devices.flat[0].platform
        if platform == "gpu":  # XLA does not count what its libraries do there
            self._flops = product_flops(traced.jaxpr)
        else:
            counted = compiled.cost_analysis() or {}
            flops = counted.get("flops", 0.0) * run.mesh.size * self._config.optim.accumulate
            self._flops = flops + run.task.uncounted_flops(platform)[0]
        logging.info("compiled the step in %.1f s: %.3g flops", time.monotonic() - began, self._flops)
        return compiled

    def _log(self, metrics: StepMetrics, skipped_files: int) -> None:
        """Logs the scalars of the last step and the counts of all steps since the last log line."""
        self._check_finite()
        self._checkpoints.check()
        metrics, task = jax.device_get(metrics), self._run.task
        values = {name: float(value) for name, value in metrics.scalars.items()}
        times = self._timer.read()
        seconds = times.data + times.compute
        self._seconds = time.monotonic() - self._started
        self._timed = {
            "steps": self._timed["steps"] + times.steps,
            "seconds": self._timed["seconds"] + times.steps * seconds,
        }
        values |= task.window_scalars(metrics.counts)
        values |= {
            f"{task.unit}_per_second": times.examples_per_second,
            **{f"{part}_per_second": n * times.examples_per_second for part, n in task.parts().items()},
            "time/data": times.data,
            "time/compute": times.compute,
            "time/longest_silence": self._heartbeat.longest_silence(),
            "goodput": self._timed["seconds"] / max(1e-9, time.monotonic() - self._began),
            "mfu": chips.model_flops_utilisation(self._flops, seconds, jax.devices(), task.dtype),
            "data/skipped_files": skipped_files,
            "memory/peak_bytes": chips.peak_device_memory_bytes(),
        }
        self._writer.scalars(self.step, values)
        for name, counts in metrics.counts.items():
            self._writer.histogram(self.step, f"{name}/window", counts)
        rate = {f"{task.unit}/s": f"{times.examples_per_second:.1f}"}
        self._progress.update(self.step, task.progress(values) | rate)

    def _evaluate(self) -> Evaluation:
        self._heartbeat.beat(self.step, "evaluating")
        with self._timer.paused():
            evaluation = self._run.task.evaluate(self.state, self._leave_if_interrupted)
            self._writer.scalars(self.step, {f"eval/{name}": value for name, value in evaluation.metrics.items()})
            for name, picture in evaluation.pictures.items():
                self._writer.image(self.step, name, picture)
            logging.info("evaluation at step %d: %s", self.step, evaluation.line)
            return evaluation

    def _leave_if_interrupted(self, done: int) -> None:
        """Leaves an evaluation after a signal, but only in a run of one process: others would wait for this one."""
        if self._interrupt.signal is not None and jax.process_count() == 1:
            raise InterruptedRunError

    def _check_finite(self) -> None:
        """Checks the scalars of the last unchecked step; if one is not finite, raises or logs it (`on_nan`)."""
        if self._unchecked is None:
            return
        step, scalars = self._unchecked
        self._unchecked = None
        bad = [f"{name} is {value}" for name, value in jax.device_get(scalars).items() if not math.isfinite(value)]
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
        if not bad:
            return
        message = f"step {step}: {', '.join(bad)}"
        if self._config.on_nan == "stop":
            raise NonFiniteError(f"{message}; the update was not applied and nothing was saved after it")
        logging.warning("%s; the update was skipped", message)
        if self._skipped_in_a_row == MOST_SKIPPED:
            raise NonFiniteError(
                f"{message}; {MOST_SKIPPED} steps in a row were skipped, so no later one is likely to be finite: lower "
                f"optim.learning_rate, or look at the data"
            )

    def _interrupted(self) -> bool:
        """Whether to stop now; several processes agree on it every few steps."""
        return (jax.process_count() == 1 or self.step % AGREE_EVERY == 0) and self._agree()

    def _agree(self) -> bool:
        """Whether any process was told to stop. InputError in all of them if one has no more batches."""
        here = np.array([[self._interrupt.signal is not None, self._no_batch is not None]], np.int32)
        told, ended = rows_of_all_hosts(here).max(axis=0).tolist()
        if ended:
            everywhere(self._raise_why)
        return bool(told)

    def _raise_why(self) -> None:
        if self._no_batch is not None:
            raise self._no_batch
