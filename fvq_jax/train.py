"""The training loop, shared by every task: data in, steps, logs, evaluation, checkpoints, report.

What a step computes belongs to the task; where arrays live, to `sharding`; what a run consists of, and what is
refused before it starts, to `run`.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fvq_jax import device
from fvq_jax.agreement import check_same, everywhere
from fvq_jax.checkpoint import Checkpoints
from fvq_jax.data.pipeline import train_batches
from fvq_jax.data.prefetch import Prefetch
from fvq_jax.errors import NonFiniteError
from fvq_jax.evals.in_training import Evaluation
from fvq_jax.heartbeat import Heartbeat, host_log
from fvq_jax.hosts import rows_of_all_hosts
from fvq_jax.interrupt import Interrupt
from fvq_jax.metrics import MetricWriter, Progress, StepTimer
from fvq_jax.ops.code_statistics import perplexity, usage
from fvq_jax.profile import Profile
from fvq_jax.report.pictures import reconstruction_grid
from fvq_jax.run import Run, check_record, log_start, prepare
from fvq_jax.sharding import global_batch
from fvq_jax.state import TrainState, abstract_state, create_state, with_params
from fvq_jax.storage import storage_errors

AGREE_EVERY = 5  # steps between two looks at whether any process was told to stop: each look waits for all of them


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: `summary` is what main prints; after an interruption the run is saved and not complete."""

    summary: dict[str, Any]
    interrupted: bool = False


def train(
    config: ConfigDict, workdir: str | os.PathLike[str], *, profile_steps: tuple[int, int] | None = None
) -> Result:
    """Trains from the newest checkpoint in `workdir`, or from the start, to the last step; then evaluates.

    Stopping at any step and calling again gives the same weights bit for bit as never stopping (same devices).

    Raises:
      InputError: before anything compiles, if config, data, weights or workdir cannot work; later, if over 1 %
        of the image files turn out to be unreadable.
      NonFiniteError: a loss or gradient norm is not finite and `on_nan` is "stop". Nothing of that step is kept.
      StorageError: a checkpoint or a log could not be written.
      DataError: no batch came for `data.timeout` seconds, or a data worker has died.
    """
    started = time.monotonic()
    keep = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())  # first: a signal during preparation is not lost
        stack.enter_context(storage_errors(Path(workdir).absolute()))
        check_same({"config": config.to_dict()})
        run = everywhere(lambda: prepare(config, workdir, stack))
        stack.enter_context(host_log(run.workdir, jax.process_index()))
        log_start(run)
        checkpoints = stack.enter_context(Checkpoints(run.workdir, **keep))
        pictures = {split: getattr(run, f"{split}_source").fingerprint() for split in ("train", "eval")}
        check_same({"checkpoint": checkpoints.latest_step(), "pictures": pictures})
        like = abstract_state(run.task.init, run.mesh)
        if checkpoints.latest_step() is None:
            state, record = create_state(run.task.init, config.seed, run.mesh), {}
            if run.init_params is not None:
                state = with_params(state, "tokenizer", run.init_params)
        else:
            restored = checkpoints.restore(like)
            state, record = restored.state, restored.record
            check_record(run, record, int(state.step))
        step = int(state.step)
        with (
            MetricWriter(run.workdir, start_step=step, active=run.first) as writer,
            Progress(run.total_steps, step, active=run.first) as progress,
            Profile(run.workdir, profile_steps) as profile,
        ):
            loop = _Loop(run, state, record, started, checkpoints, writer, progress, profile, interrupt)
            try:
                evaluation = loop.run()
            except InterruptedRunError:
                loop.save()
                checkpoints.wait()
                why = interrupt.signal.name if interrupt.signal else "another process was told to stop"
                logging.warning("%s: saved step %d, start me again to go on", why, loop.step)
                return Result({}, interrupted=True)
        run.report(loop.state, evaluation)
        return Result(run.summary(loop.step, evaluation, loop.record()))


class InterruptedRunError(Exception):
    """Leaves the steps or an evaluation when a signal has arrived."""


class _Loop:
    """The steps of one call of `train`, and what they leave behind."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        record: dict[str, Any],
        started: float,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        progress: Progress,
        profile: Profile,
        interrupt: Interrupt,
    ):
        self.state = state
        self.step = int(state.step)
        self._run, self._config = run, run.config
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._profile, self._interrupt = profile, interrupt
        self._heartbeat = Heartbeat(run.workdir, jax.process_index())
        self._began = record.get("began", time.time())  # in seconds since 1970: the time between two calls counts
        # Wall time of earlier calls counts: seconds is the time of the whole run.
        self._started = started - record.get("seconds", 0.0)
        self._seconds = record.get("seconds", 0.0)
        self._timed = record.get("timed", {"steps": 0, "seconds": 0.0})
        self._timer = StepTimer(self._config.batch_size)
        self._unchecked: tuple[int, dict[str, jax.Array]] | None = None

    def run(self) -> Evaluation:
        """Steps to the end, then the final checkpoint and evaluation."""
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
            "data": self._run.data_position(self.step),
            "config": json.loads(self._config.to_json()),
            "began": self._began,
            "seconds": self._seconds,
            "timed": timed,
            "images_per_second": rate,
        }

    def save(self) -> None:
        """Starts a checkpoint of the current step."""
        self._check_finite()
        self._seconds = time.monotonic() - self._started if self.step else 0.0
        self._heartbeat.beat(self.step, "saving")
        with self._timer.paused():
            self._checkpoints.save(self.state, self.step, self.record())

    def _batches(self) -> Prefetch[tuple[dict[str, jax.Array], int]]:
        """Batches on the devices, each with how many files had been skipped when it was made."""
        config, mesh = self._config, self._run.mesh
        batches = train_batches(
            self._run.train_source,
            image_size=config.data.image_size,
            resize_min=config.data.resize_min,
            resize_max=config.data.resize_max,
            flip=config.data.flip,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=self.step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
        )

        def place(batch: dict[str, np.ndarray]) -> tuple[dict[str, jax.Array], int]:
            return global_batch(batch, mesh), len(batches.skipped)

        return Prefetch(batches, place, timeout=config.data.timeout)

    def _steps(self, batches: Prefetch[tuple[dict[str, jax.Array], int]]) -> None:
        config, run = self._config, self._run
        batch, skipped_files = next(batches)
        train_step = self._compile(batch)
        counts = None
        self._timer.read()
        while True:
            if self._interrupted():
                raise InterruptedRunError
            self._profile.before(self.step + 1)
            self.state, metrics = train_step(self.state, batch, run.task.frozen)
            self.step += 1
            self._profile.after(self.step, metrics)
            self._heartbeat.beat(self.step, "training")
            self._timer.step()
            counts = metrics.code_counts if counts is None else counts + metrics.code_counts
            self._check_finite()  # of the step before, while this one runs
            self._unchecked = (self.step, metrics.scalars)
            last = self.step == run.total_steps
            if last or self.step % config.log.every_steps == 0:
                self._log(metrics.scalars, np.asarray(counts), skipped_files)
                counts = None
            else:
                self._progress.update(self.step)
            if last:
                return
            if self.step % config.checkpoint.every_steps == 0:
                self.save()
            if config.eval.every_steps and self.step % config.eval.every_steps == 0:
                self._evaluate()
            if not batches.ready():
                jax.block_until_ready(metrics.scalars)  # time in which the devices have work is not waiting for data
            with self._timer.data():
                batch, skipped_files = next(batches)

    def _compile(self, batch: dict[str, jax.Array]):
        run = self._run
        began = time.monotonic()
        self._heartbeat.beat(self.step, "compiling")
        compiled = run.task.jitted_step(self.state).lower(self.state, batch, run.task.frozen).compile()
        flops = compiled.cost_analysis().get("flops", 0.0) * run.mesh.size * self._config.optim.accumulate
        self._flops = flops + run.task.uncounted_flops(self._config.batch_size)
        logging.info("compiled the step in %.1f s: %.3g flops", time.monotonic() - began, self._flops)
        return compiled

    def _log(self, scalars: dict[str, jax.Array], counts: np.ndarray, skipped_files: int) -> None:
        self._check_finite()
        self._checkpoints.check()
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        times = self._timer.read()
        seconds = times.data + times.compute
        self._seconds = time.monotonic() - self._started
        self._timed = {
            "steps": self._timed["steps"] + times.steps,
            "seconds": self._timed["seconds"] + times.steps * seconds,
        }
        values |= {
            "usage/window": float(usage(counts)),
            "perplexity/window": float(perplexity(counts)),
            "tokens/window": int(counts.sum()),
            "images_per_second": times.images_per_second,
            "time/data": times.data,
            "time/compute": times.compute,
            "time/longest_silence": self._heartbeat.longest_silence(),
            "goodput": self._timed["seconds"] / max(1e-9, time.time() - self._began),
            "mfu": device.model_flops_utilisation(self._flops, seconds, jax.devices(), self._run.task.dtype),
            "data/skipped_files": skipped_files,
            "memory/peak_bytes": device.peak_device_memory_bytes(),
        }
        self._writer.scalars(self.step, values)
        self._writer.histogram(self.step, "codes/window", counts)
        self._progress.update(
            self.step,
            loss=values["loss/total"],
            usage=values["usage/window"],
            images_per_second=times.images_per_second,
        )

    def _evaluate(self) -> Evaluation:
        self._heartbeat.beat(self.step, "evaluating")
        with self._timer.paused():
            evaluation = self._run.evaluator.evaluate(self.state, self._leave_if_interrupted)
            scores, sums = evaluation.metrics, evaluation.found.sums
            counted = {"images": sums.images, "tokens": sums.code_counts.sum()}
            self._writer.scalars(self.step, {f"eval/{name}": value for name, value in (scores | counted).items()})
            pairs = [(example.original, example.reconstruction) for example in evaluation.found.examples.spread]
            if self._run.first and pairs:
                self._writer.image(
                    self.step, "reconstructions", reconstruction_grid(*map(np.stack, zip(*pairs, strict=True)))
                )
            logging.info(
                "evaluation at step %d: PSNR %.2f dB, SSIM %.3f, "
                "%.2f %% of %d codes used over %d tokens, perplexity %.0f",
                self.step,
                scores["psnr"],
                scores["ssim"],
                100 * scores["usage"],
                self._run.task.codebook_size,
                counted["tokens"],
                scores["perplexity"],
            )
            return evaluation

    def _leave_if_interrupted(self, done: int) -> None:
        """Only a single process may leave an evaluation alone: the others would wait for it."""
        if self._interrupt.signal is not None and jax.process_count() == 1:
            raise InterruptedRunError

    def _check_finite(self) -> None:
        """Looks at the scalars of the last unchecked step; in a run that stops on NaN, this is where it stops."""
        if self._unchecked is None:
            return
        step, scalars = self._unchecked
        self._unchecked = None
        bad = [f"{name} is {value}" for name, value in jax.device_get(scalars).items() if not math.isfinite(value)]
        if not bad:
            return
        message = f"step {step}: {', '.join(bad)}"
        if self._config.on_nan == "stop":
            raise NonFiniteError(f"{message}; the update was not applied and nothing was saved after it")
        logging.warning("%s; the update was skipped", message)

    def _interrupted(self) -> bool:
        """Whether to stop now; several processes agree on it every few steps."""
        here = self._interrupt.signal is not None
        if jax.process_count() == 1:
            return here
        if self.step % AGREE_EVERY:
            return False
        return bool(rows_of_all_hosts(np.array([here])).any())
