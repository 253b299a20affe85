"""One run of the training program: its parts, made from a config, and all that is checked before it may start.

The steps, and what they write, belong to `train`.
"""

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import jax
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fvq_jax.config import check_continues, flatten, has_discriminator, validate
from fvq_jax.data.pipeline import steps_per_epoch
from fvq_jax.data.record import Source
from fvq_jax.data.sources import make_source
from fvq_jax.errors import InputError
from fvq_jax.evals.in_training import Evaluation, Evaluator
from fvq_jax.evals.suite import conditions
from fvq_jax.metrics import read_metrics
from fvq_jax.report.page import Report, write_page
from fvq_jax.saved_tokenizer import load_params
from fvq_jax.sharding import make_mesh
from fvq_jax.state import TrainState
from fvq_jax.storage import complete_steps
from fvq_jax.tasks.tokenizer import TokenizerTask
from fvq_jax.workdir_lock import hold

CONFIG_FILE = "config.json"
# Of an evaluation, in the result line.
SCORES = ("psnr", "ssim", "l1", "mse", "lpips_vgg", "rfid", "inception_score", "usage", "perplexity")


@dataclasses.dataclass
class Run:
    """Everything that stays the same during one run."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    task: TokenizerTask
    total_steps: int
    train_source: Source
    eval_source: Source
    evaluator: Evaluator
    first: bool  # this process writes
    init_params: dict[str, Any] | None  # where the tokenizer of a new run starts, if not at random

    def data_position(self, step: int) -> dict[str, Any]:
        """The data iterator: the batch of a step follows from the pictures, the seed and the step."""
        return {"next_step": step, "seed": self.config.seed, "pictures": self.train_source.fingerprint()}

    def summary(self, step: int, evaluation: Evaluation, record: dict[str, Any]) -> dict[str, Any]:
        """The result line."""
        sums = evaluation.found.sums
        networks = jax.eval_shape(self.task.init, jax.random.key(0)).networks
        return {
            "step": step,
            **{name: evaluation.metrics[name] for name in SCORES if name in evaluation.metrics},
            "images": int(sums.images),
            "tokens": int(sums.code_counts.sum()),
            "codebook_size": self.task.codebook_size,
            "parameters": int(parameter_overview.count_parameters(networks["tokenizer"].params)),
            "images_per_second": record["images_per_second"],
            "seconds": record["seconds"],
            "workdir": str(self.workdir),
        }

    def report(self, state: TrainState, evaluation: Evaluation) -> None:
        """Writes `workdir/report/`. All processes must call it."""
        plane = self.evaluator.plane(state)
        if not self.first:
            return
        data, found = self.config.data, evaluation.found
        facts = conditions(
            found, self.eval_source, data=data_name(self.config), protocol="direct", size=data.image_size
        )
        report = Report(
            net=self.task.net,
            facts={"workdir": str(self.workdir), "step": int(state.step), **facts},
            metrics=evaluation.metrics,
            not_computed=evaluation.not_computed,
            found=found,
            plane=plane,
            rows=read_metrics(self.workdir),
            batch_tokens=self.task.tokens(self.config.batch_size),
            config=flatten(self.config),
        )
        logging.info("report: %s", write_page(self.workdir, report))


def prepare(config: ConfigDict, workdir: str | os.PathLike[str], stack: contextlib.ExitStack) -> Run:
    """Checks everything that can be wrong, in the order in which it is cheap to check.

    Claims the workdir until `stack` is left. Raises InputError for whatever cannot work.
    """
    validate(config, jax.device_count())
    mesh = make_mesh(config.mesh.data, config.mesh.codebook)
    if config.batch_size % jax.process_count():
        raise InputError(f"batch_size {config.batch_size} is not divisible by {jax.process_count()} processes")
    workdir = Path(workdir).absolute()
    first = jax.process_index() == 0
    _check_workdir(workdir, config)
    if first:
        stack.enter_context(hold(workdir))
    splits = {split: source_of(config, split) for split in ("train", "eval")}
    epoch = steps_per_epoch(splits["train"], config.batch_size)
    total = config.steps or math.ceil(config.epochs * epoch)
    warmup = config.optim.warmup_steps or round(config.optim.warmup_epochs * epoch)
    if warmup >= total:
        raise InputError(
            f"a warm-up of {warmup} steps leaves nothing of the {total} steps of this run: lower "
            "optim.warmup_steps or optim.warmup_epochs"
        )
    task = TokenizerTask(config, mesh, total, warmup)
    evaluator = Evaluator(config, mesh, task, splits["eval"])
    init_params = load_params(config) if config.init_from and not complete_steps(workdir) else None
    if first and not (workdir / CONFIG_FILE).exists():  # only now, when nothing is left that could be refused
        unfinished = workdir / f"{CONFIG_FILE}.tmp"
        try:
            unfinished.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
            unfinished.replace(workdir / CONFIG_FILE)
        except OSError as error:
            raise InputError(f"workdir {workdir} cannot be written: {error.strerror or error}") from None
    return Run(config, workdir, mesh, task, total, splits["train"], splits["eval"], evaluator, first, init_params)


def source_of(config: ConfigDict, split: Literal["train", "eval"]) -> Source:
    """The pictures that a config names. InputError if they cannot be had."""
    data = config.data
    return make_source(
        data.source,
        split,
        image_size=data.image_size,
        train_dir=data.train_dir,
        eval_dir=data.eval_dir,
        tfds_name=data.tfds_name,
        tfds_dir=data.tfds_dir,
        train_split=data.train_split,
        eval_split=data.eval_split,
        eval_images=config.eval.images,
    )


def data_name(config: ConfigDict) -> str:
    """What a report calls the evaluation set of a config."""
    data = config.data
    what = {"photos": "bundled photographs, held-out regions", "tfds": f"{data.tfds_name} {data.eval_split}"}
    return what.get(data.source, data.eval_dir)


def _check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes the workdir, or checks that it can be written and that the run in it is this one."""
    path = workdir / CONFIG_FILE
    if ":/" in str(workdir):
        raise InputError(f"workdir {workdir} is not a local path: mount the bucket and give the mounted folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
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


def check_record(run: Run, record: dict[str, Any], step: int) -> None:
    """Raises InputError if a checkpoint does not come from this run: same model, same pictures in the same order."""
    check_continues(record["config"], run.config)
    before, now = record["data"], run.data_position(step)
    if before != now:
        raise InputError(
            f"the pictures to train on are not those this run began with ({before['pictures']} -> "
            f"{now['pictures']}): bring the same ones back, or start in another workdir"
        )


def log_start(run: Run) -> None:
    """Logs devices, sizes and what is switched off."""
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
