"""The training loop, shared by every task: data in, steps, logs, evaluation, checkpoints, report.

What a step computes belongs to the task; where arrays live, to `sharding`; what is refused, to `config`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from fvq_jax import device
from fvq_jax.checkpoint import Checkpoints
from fvq_jax.config import check_continues, has_discriminator, validate
from fvq_jax.data.pipeline import Batches, eval_batches, steps_per_epoch, train_batches
from fvq_jax.data.sources import Source, make_source
from fvq_jax.errors import InputError, NonFiniteError
from fvq_jax.evals.evaluate import Evaluation, evaluate
from fvq_jax.interrupt import Interrupt
from fvq_jax.metrics import MetricWriter, Progress, StepTimer, read_metrics
from fvq_jax.ops.code_statistics import perplexity, usage
from fvq_jax.report import reconstruction_grid, write_report
from fvq_jax.saved_tokenizer import CHECKPOINTS, load_params
from fvq_jax.sharding import BATCH, global_batch, make_mesh, replicated
from fvq_jax.state import TrainState, abstract_state, create_state, with_params
from fvq_jax.tasks.tokenizer import TokenizerTask

CONFIG_FILE = "config.json"
AGREE_EVERY = 5  # steps between two looks at whether any process was told to stop: each look waits for all of them


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: `summary` is what main prints; after an interruption the run is saved and not complete."""

    summary: dict[str, Any]
    interrupted: bool = False


class _InterruptedError(Exception):
    """Leaves an evaluation when a signal has arrived."""


@dataclasses.dataclass
class _Run:
    """Everything that stays the same during one run."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    task: TokenizerTask
    total_steps: int
    train_source: Source
    eval_source: Source
    first: bool  # this process writes
    init_params: dict[str, Any] | None  # where the tokenizer of a new run starts, if not at random

    def evaluation(self, state: TrainState, interrupt: Interrupt | None = None) -> Evaluation:
        """The evaluation of this state over the whole evaluation set."""
        config = self.config
        batches = eval_batches(
            self.eval_source,
            image_size=config.data.image_size,
            batch_size=config.eval.batch_size,
            limit=config.eval.images,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
        )
        params, batches_left = self._eval_params(state), _until(batches, interrupt)
        try:
            return evaluate(self._eval_step, params, batches_left, self.mesh, keep_images=config.log.images)
        finally:
            batches.close()

    # Kept, since a new jitted function would compile again at every evaluation.
    @functools.cached_property
    def _eval_params(self):
        return jax.jit(self.task.eval_params)

    @functools.cached_property
    def _eval_step(self):
        layout = (replicated(self.mesh), NamedSharding(self.mesh, BATCH))
        return jax.jit(self.task.eval_step, out_shardings=layout)

    def data_position(self, step: int) -> dict[str, Any]:
        """The data iterator: the batch of a step follows from the pictures, the seed and the step."""
        return {"next_step": step, "seed": self.config.seed, "pictures": self.train_source.fingerprint()}

    def summary(self, step: int, evaluation: Evaluation, record: dict[str, Any]) -> dict[str, Any]:
        """The result line."""
        return {
            "step": step,
            **evaluation.scalars,
            "codebook_size": self.task.codebook_size,
            "images_per_second": record["images_per_second"],
            "seconds": record["seconds"],
            "workdir": str(self.workdir),
        }

    def report(self, evaluation: Evaluation) -> None:
        """Writes `workdir/report/`."""
        if not self.first:
            return
        rows = read_metrics(self.workdir)
        pictures = write_report(
            self.workdir,
            rows,
            evaluation.code_counts,
            evaluation.originals,
            evaluation.reconstructions,
            batch_tokens=self.task.tokens(self.config.batch_size),
            window_tokens=max((int(row.get("tokens/window", 0)) for row in rows), default=0) or None,
        )
        logging.info("pictures: %s", ", ".join(map(str, pictures)))


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> Result:
    """Trains from the newest checkpoint in `workdir`, or from the start, to the last step; then evaluates.

    Stopping at any step and calling again gives the same weights bit for bit as never stopping (same devices).

    Raises:
      InputError: before anything compiles, if config, data, weights or workdir cannot work; later, if over 1 %
        of the image files turn out to be unreadable.
      NonFiniteError: a loss or gradient norm is not finite and `on_nan` is "stop". Nothing of that step is kept.
    """
    started = time.monotonic()
    keep = {"keep_last": config.checkpoint.keep_last, "keep_every": config.checkpoint.keep_every}
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())  # first: a signal during preparation is not lost
        run = _prepare(config, workdir)
        _log_start(run)
        checkpoints = stack.enter_context(Checkpoints(run.workdir, **keep))
        like = abstract_state(run.task.init, run.mesh)
        if checkpoints.latest_step() is None:
            state, record = create_state(run.task.init, config.seed, run.mesh), {}
            if run.init_params is not None:
                state = with_params(state, "tokenizer", run.init_params)
        else:
            restored = checkpoints.restore(like)
            state, record = restored.state, restored.record
            _check_record(run, record, int(state.step))
        step = int(state.step)
        with (
            MetricWriter(run.workdir, start_step=step, active=run.first) as writer,
            Progress(run.total_steps, step, active=run.first) as progress,
        ):
            loop = _Loop(run, state, record, started, checkpoints, writer, progress, interrupt)
            try:
                evaluation = loop.run()
            except _InterruptedError:
                loop.save()
                checkpoints.wait()
                logging.warning("%s: saved step %d, start me again to go on", interrupt.signal.name, loop.step)
                return Result({}, interrupted=True)
        run.report(evaluation)
        return Result(run.summary(loop.step, evaluation, loop.record()))


def evaluate_checkpoint(config: ConfigDict, workdir: str | os.PathLike[str]) -> Result:
    """Scores the last checkpoint of `workdir` exactly as training does at its end, and writes the report.

    Raises:
      InputError: there is no checkpoint, or it belongs to another model.
    """
    if not (Path(workdir) / "checkpoints").is_dir():
        raise InputError(f"no checkpoint in {workdir}")
    run = _prepare(config, workdir, claim=False)
    with Checkpoints(run.workdir, keep_last=config.checkpoint.keep_last) as checkpoints:
        restored = checkpoints.restore(abstract_state(run.task.init, run.mesh))
    evaluation = run.evaluation(restored.state)
    run.report(evaluation)
    return Result(run.summary(int(restored.state.step), evaluation, restored.record))


class _Loop:
    """The steps of one call of `train`, and what they leave behind."""

    def __init__(
        self,
        run: _Run,
        state: TrainState,
        record: dict[str, Any],
        started: float,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        progress: Progress,
        interrupt: Interrupt,
    ):
        self.state = state
        self.step = int(state.step)
        self._run, self._config = run, run.config
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._interrupt = interrupt
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
        return evaluation

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        timed = self._timed
        rate = timed["steps"] * self._config.batch_size / timed["seconds"] if timed["seconds"] else 0.0
        return {
            "data": self._run.data_position(self.step),
            "config": json.loads(self._config.to_json()),
            "seconds": self._seconds,
            "timed": timed,
            "images_per_second": rate,
        }

    def save(self) -> None:
        """Starts a checkpoint of the current step."""
        self._check_finite()
        self._seconds = time.monotonic() - self._started if self.step else 0.0
        with self._timer.paused():
            self._checkpoints.save(self.state, self.step, self.record())

    def _batches(self) -> Batches:
        config = self._config
        return train_batches(
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

    def _steps(self, batches: Batches) -> None:
        config, run = self._config, self._run
        batch = global_batch(next(batches), run.mesh)
        train_step = self._compile(batch)
        counts = None
        self._timer.read()
        while True:
            if self._interrupted():
                raise _InterruptedError
            self.state, metrics = train_step(self.state, batch, run.task.frozen)
            self.step += 1
            self._timer.step()
            counts = metrics.code_counts if counts is None else counts + metrics.code_counts
            self._check_finite()  # of the step before, while this one runs
            self._unchecked = (self.step, metrics.scalars)
            last = self.step == run.total_steps
            if last or self.step % config.log.every_steps == 0:
                self._log(metrics.scalars, np.asarray(counts), len(batches.skipped))
                counts = None
            else:
                self._progress.update(self.step)
            if last:
                return
            if self.step % config.checkpoint.every_steps == 0:
                self.save()
            if config.eval.every_steps and self.step % config.eval.every_steps == 0:
                self._evaluate()
            with self._timer.data():
                batch = global_batch(next(batches), run.mesh)

    def _compile(self, batch: dict[str, jax.Array]):
        run = self._run
        began = time.monotonic()
        compiled = run.task.jitted_step(self.state).lower(self.state, batch, run.task.frozen).compile()
        flops = compiled.cost_analysis().get("flops", 0.0) * run.mesh.size * self._config.optim.accumulate
        self._flops = flops + run.task.uncounted_flops(self._config.batch_size)
        logging.info("compiled the step in %.1f s: %.3g flops", time.monotonic() - began, self._flops)
        return compiled

    def _log(self, scalars: dict[str, jax.Array], counts: np.ndarray, skipped_files: int) -> None:
        self._check_finite()
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
        with self._timer.paused():
            evaluation = self._run.evaluation(self.state, self._interrupt)
            scores = evaluation.scalars
            self._writer.scalars(self.step, {f"eval/{name}": value for name, value in scores.items()})
            if self._run.first:
                grid = reconstruction_grid(evaluation.originals, evaluation.reconstructions)
                self._writer.image(self.step, "reconstructions", grid)
            logging.info(
                "evaluation at step %d: PSNR %.2f dB, SSIM %.3f, "
                "%.2f %% of %d codes used over %d tokens, perplexity %.0f",
                self.step,
                scores["psnr"],
                scores["ssim"],
                100 * scores["usage"],
                self._run.task.codebook_size,
                scores["tokens"],
                scores["perplexity"],
            )
            return evaluation

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
        return bool(multihost_utils.process_allgather(np.array(here)).any())


def _prepare(config: ConfigDict, workdir: str | os.PathLike[str], *, claim: bool = True) -> _Run:
    """Checks everything that can be wrong, in the order in which it is cheap to check."""
    validate(config, jax.device_count())
    mesh = make_mesh(config.mesh.data, config.mesh.codebook)
    if config.batch_size % jax.process_count():
        raise InputError(f"batch_size {config.batch_size} is not divisible by {jax.process_count()} processes")
    workdir = Path(workdir).absolute()
    _check_workdir(workdir, config)
    splits = {
        split: make_source(
            config.data.source,
            split,
            image_size=config.data.image_size,
            train_dir=config.data.train_dir,
            eval_dir=config.data.eval_dir,
            eval_images=config.eval.images,
        )
        for split in ("train", "eval")
    }
    epoch = steps_per_epoch(splits["train"], config.batch_size)
    total = config.steps or math.ceil(config.epochs * epoch)
    warmup = config.optim.warmup_steps or round(config.optim.warmup_epochs * epoch)
    if warmup >= total:
        raise InputError(
            f"a warm-up of {warmup} steps leaves nothing of the {total} steps of this run: lower "
            "optim.warmup_steps or optim.warmup_epochs"
        )
    task = TokenizerTask(config, mesh, total, warmup)
    # One that was interrupted while it was written has a longer name.
    new = not any(re.fullmatch(r"step_\d+", path.name) for path in (workdir / CHECKPOINTS).glob("*"))
    init_params = load_params(config) if config.init_from and new else None
    first = jax.process_index() == 0
    if claim and first and not (workdir / CONFIG_FILE).exists():  # only now, when nothing is left that could be refused
        unfinished = workdir / f"{CONFIG_FILE}.tmp"
        unfinished.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
        unfinished.replace(workdir / CONFIG_FILE)
    return _Run(config, workdir, mesh, task, total, splits["train"], splits["eval"], first, init_params)


def _check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes the workdir, or checks that it can be written and that the run in it is this one."""
    path = workdir / CONFIG_FILE
    if ":/" in str(workdir):
        raise InputError(f"workdir {workdir} is not a local path: mount the bucket and give the mounted folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.R_OK | os.W_OK | os.X_OK):
            raise InputError(f"workdir {workdir} cannot be used: no permission to read and write")
        if path.exists():
            saved = json.loads(path.read_text())
            if not isinstance(saved, dict):
                raise InputError(f"{path} is not a config, but {type(saved).__name__}")
            for line in check_continues(saved, config):
                logging.info("changed since the run began: %s", line)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path} is not a config: {error}") from None
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used: {error.strerror or error}") from None


def _check_record(run: _Run, record: dict[str, Any], step: int) -> None:
    """A checkpoint must come from this run: same model, same pictures in the same order."""
    check_continues(record["config"], run.config)
    before, now = record["data"], run.data_position(step)
    if before != now:
        raise InputError(
            f"the pictures in data.train_dir are not those this run began with ({before['pictures']} -> "
            f"{now['pictures']}): put the same files there, or start in another workdir"
        )


def _log_start(run: _Run) -> None:
    devices, config = jax.devices(), run.config
    logging.info("%d x %s, mesh %s", len(devices), devices[0].device_kind, dict(run.mesh.shape))
    state = jax.eval_shape(run.task.init, jax.random.key(0))
    for name, network in state.networks.items():
        logging.info("%s: %s parameters", name, f"{parameter_overview.count_parameters(network.params):,}")
    logging.info("%d steps of %d images", run.total_steps, config.batch_size)
    if config.loss.perceptual_weight == 0:
        logging.info("no perceptual loss (loss.perceptual_weight=0): LPIPS is not used and needs no weight files")
    if not has_discriminator(config):
        logging.info("no adversarial loss (adversarial.weight=0 or optim.train_only=tokenizer): no discriminator")


def _until(batches: Iterator[dict[str, np.ndarray]], interrupt: Interrupt | None) -> Iterator[dict[str, np.ndarray]]:
    """The batches, until a signal arrives. Only a single process may stop alone: the others would wait for it."""
    for batch in batches:
        if interrupt is not None and interrupt.signal is not None and jax.process_count() == 1:
            raise _InterruptedError
        yield batch
