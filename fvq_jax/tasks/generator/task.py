"""Training a generator on the codes of a tokenizer (LlamaGen, arXiv 2406.06525): its network, gradients and data.

The generator sees codes and labels only. The evaluation is in `evaluation`, and sampling in `inference.generator`.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped
from ml_collections import ConfigDict

from fvq_jax.data.codes import CodeSource, code_batches
from fvq_jax.evals.metric_table import METRICS
from fvq_jax.models.gpt import RULES
from fvq_jax.ops.code_usage import code_histogram, perplexity, usage
from fvq_jax.ops.token_loss import token_nll
from fvq_jax.report.generator import GeneratorReport, best_of, write_generator_report
from fvq_jax.report.pictures import sample_grid
from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.mesh import Rules
from fvq_jax.runtime.names import dotted
from fvq_jax.tasks.generator import checks, flops
from fvq_jax.tasks.generator.codes import check_tokenizer, source_of
from fvq_jax.tasks.generator.evaluation import Evaluator
from fvq_jax.tasks.generator.fields import fields, network
from fvq_jax.tasks.generator.samples import Samples
from fvq_jax.tasks.generator.start import load_params
from fvq_jax.training.optim import Annealing, make_optimizer
from fvq_jax.training.state import TrainState
from fvq_jax.training.task import Batches, Evaluation, Gradients, Task

_NAME = "generator"


class GeneratorTask(Task):
    """Trains a class-conditional transformer over codes; the contract is `training.task.Task`."""

    unit: ClassVar[str] = "images"
    main: ClassVar[str] = _NAME
    headline: ClassVar[Sequence[str]] = (
        "nll_bits",
        "unigram_bits",
        "bigram_bits",
        "nll",
        "nll_perplexity",
        "accuracy",
        "bits_per_pixel",
        "fid",
        "class_accuracy",
        "class_accuracy_unguided",
        "class_accuracy_of_real",
        "best_guidance",
        "samples_per_second",
    )
    scores: ClassVar[Sequence[str]] = ("nll_bits", "class_accuracy", "fid")
    rules: Rules = RULES  # of parameters, moments and moving average alike

    @classmethod
    def fields(cls, config: ConfigDict | None = None) -> dict[str, Field]:
        """The fields of `tasks/generator/fields.py`."""
        return fields()

    @classmethod
    def check(cls, config: ConfigDict, devices: int) -> None:
        """See `tasks/generator/checks.py`."""
        checks.check(config, devices)

    @classmethod
    def plannable(cls, config: ConfigDict, devices: int) -> dict[str, Any]:
        """Folders that need not exist, and an eval.batch_size that fits the devices."""
        return {"data.train_dir": "not read", "data.eval_dir": "not read", "eval.batch_size": devices}

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self.dtype = jnp.dtype(config.generator.dtype)
        self.net = network(config, dtype=self.dtype, mesh=mesh)
        self._sources: dict[str, CodeSource] = {}

    # --- networks -----------------------------------------------------------------------------------------------

    def init(self, key: Shaped[Array, ""]) -> dict[str, dict[str, Any]]:
        """The parameters of the generator; the head is zero, so that every code is equally likely at first."""
        images = self._mesh.size  # shapes of parameters do not depend on it, but an image per device is needed
        labels, codes = jnp.zeros(images, jnp.int32), jnp.zeros((images, self.net.length), jnp.int32)
        return {_NAME: {"params": self.net.init(key, labels, codes)["params"]}}

    def load(self, path: str) -> Any:
        """The parameters of a generator of this architecture, in whatever form it was saved."""
        return load_params(path, self.net)

    def optimizers(self, annealing: Annealing) -> dict[str, optax.GradientTransformation]:
        """AdamW. The weights of norms do not decay: they are vectors, of which a stack has one per layer."""
        optim = self._config.optim
        return {
            _NAME: make_optimizer(
                annealing.rate(optim.learning_rate),
                b1=optim.b1,
                b2=optim.b2,
                clip_norm=optim.clip_norm,
                weight_decay=optim.weight_decay,
                decayed=lambda name: not name.endswith("norm"),
            )
        }

    # --- a step -------------------------------------------------------------------------------------------------

    @property
    def frozen(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def abstract_frozen(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Codes and labels, as `data.codes.code_batches` yields them."""
        batch = self._config.batch_size
        return {
            "codes": jax.ShapeDtypeStruct((batch, self.net.length), jnp.int32),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def gradients(
        self, state: TrainState, batch: dict[str, Any], key: Shaped[Array, ""], frozen: dict[str, Any]
    ) -> Gradients:
        """Of the mean negative log likelihood of all codes, in nats."""
        labels, codes = batch["label"], batch["codes"]

        def loss(params: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
            hidden: Any = self.net.apply({"params": params}, labels, codes, train=True, key=key)
            nats, hits = token_nll(hidden, params["output"], codes, mesh=self._mesh, dtype=self.dtype)
            return nats.mean(), hits.mean(dtype=jnp.float32)

        (nats, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(state.networks[_NAME].params)
        scalars = {"loss/total": nats, "nll_bits": nats / math.log(2), "accuracy": accuracy}
        return Gradients({_NAME: grads}, scalars, {"codes": code_histogram(codes, self.net.vocab)}, {_NAME: {}})

    def batch_scalars(self, counts: dict[str, Any]) -> dict[str, Any]:
        """None."""
        return {}

    def uncounted_flops(self, platform: str) -> tuple[float, float]:
        """All layers but one, and all blocks of the loss but one; XLA shows the passes of their products itself."""
        images, micro = self._config.batch_size, self._config.optim.accumulate
        return flops.uncounted_flops(self.net, images, self._mesh.size, self._mesh.shape["codebook"], micro), 1.0

    # --- data ---------------------------------------------------------------------------------------------------

    def source(self, split: Literal["train", "eval"]) -> CodeSource:
        """The codes of the config."""
        if split not in self._sources:
            self._sources[split] = source_of(self._config, split)
        return self._sources[split]

    def batches(self, step: int) -> Batches:
        """Codes with their labels, see `data.codes.code_batches`."""
        config = self._config
        return code_batches(
            self.source("train"),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
            vocab=self.net.vocab,
            classes=self.net.classes,
        )

    def provenance(self) -> dict[str, Any]:
        """Which tokenizer the codes come from (its fingerprint), how they were extracted, and names of the classes."""
        info = self.source("train").info
        return {
            "tokenizer": info.tokenizer,
            "condition": info.condition,
            "image_size": info.size,
            "class_names": list(info.class_names),
        }

    # --- figures ------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, int]:
        """The codes of an image."""
        return {"tokens": self.net.length}

    def window_scalars(self, counts: dict[str, np.ndarray]) -> dict[str, float]:
        """Usage and perplexity of the codes that were trained on in the window, and how many there were."""
        codes = counts["codes"]
        return {
            "usage/window": float(usage(codes)),
            "perplexity/window": float(perplexity(codes)),
            "tokens/window": int(codes.sum()),
        }

    def progress(self, scalars: Mapping[str, float]) -> dict[str, str]:
        """Bits per code, and how many codes were the likeliest."""
        return {"bits": f"{scalars['nll_bits']:.3f}", "accuracy": f"{scalars['accuracy']:.1%}"}

    def log_start(self) -> None:
        """Logs what the codes are."""
        train, held_out = self.source("train"), self.source("eval")
        info = train.info
        logging.info(
            "codes of tokenizer %s (condition: %s): %d images with %d scales of %d crops, %d held out",
            info.tokenizer or "of unknown name",
            info.condition or "not known",
            len(train),
            info.scales,
            info.crops,
            len(held_out),
        )

    def open_files(self) -> None:
        """Compares the tokenizers of both splits, and with `data.tokenizer` if it is given; opens what samples need."""
        check_tokenizer(self._config, self.source("train"), self.source("eval"))
        _ = self.samples

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The programs that evaluate."""
        return Evaluator(self._config, self._mesh, self.net, self.source("train"), self.source("eval"))

    @functools.cached_property
    def samples(self) -> Samples | None:
        """The programs that draw and score samples; None if the config asks for none."""
        if not self._config.eval.samples:
            return None
        return Samples(self._config, self._mesh, self.net, self.provenance())

    def evaluate(self, state: TrainState, progress: Callable[[int], Any] = lambda done: None) -> Evaluation:
        """Predicts the held-out codes and draws samples, with the average of the parameters if there is one."""
        params = state.ema or state.networks[_NAME].params
        metrics, facts = self.evaluator.evaluate(params, progress)
        line = (
            f"{metrics['nll_bits']:.3f} bits per code (unigram {metrics['unigram_bits']:.3f}, bigram "
            f"{metrics['bigram_bits']:.3f}), {metrics['accuracy']:.2%} of {facts['codes']} codes were the likeliest"
        )
        if self.samples is None:
            return Evaluation(metrics, facts, line, {})
        scores, sets = self.samples.evaluate(params, progress)
        shown = [name for name in ("fid", "class_accuracy") if name in scores]
        line += "".join(f", {METRICS[name].heading} {METRICS[name].text(scores[name])}" for name in shown)
        line += f" at guidance {scores['best_guidance']:g}" if shown else ""
        best = best_of(sets)
        assert best is not None
        assert best.pictures is not None
        pictures = {"samples": sample_grid(best.pictures, columns=max(Counter(best.captions).values()))}
        return Evaluation(metrics | scores, facts | {"samples": len(sets) * best.images}, line, pictures, details=sets)

    def report(
        self, state: TrainState, evaluation: Evaluation, workdir: Path, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes `workdir/report/`: figures, samples and their scores, curves and config."""
        if jax.process_index() != 0:
            return
        config, info = self._config, self.source("train").info
        facts = {
            "workdir": str(workdir),
            "step": int(state.step),
            "data": config.data.eval_dir,
            "images": evaluation.facts["images"],
            "codes": evaluation.facts["codes"],
            "tokenizer": info.tokenizer or "not known",
            "condition": info.condition or "not known",
        }
        report = GeneratorReport(
            title=f"Generator, step {int(state.step)}",
            facts=facts,
            metrics=evaluation.metrics,
            samples=evaluation.details or (),
            rows=rows,
            config=dotted(config),
        )
        logging.info("report: %s", write_generator_report(workdir, report))
