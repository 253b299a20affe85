"""The task of training a tokenizer: its networks, optimizers, data, gradients, evaluation and report."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped
from ml_collections import ConfigDict

from fvq_jax.data.fields import PICTURES
from fvq_jax.data.pipeline import Batches, train_batches
from fvq_jax.data.record import Source
from fvq_jax.evals.reconstruction import conditions
from fvq_jax.inference.saved import load_params
from fvq_jax.interop.lpips import load_lpips
from fvq_jax.models.discriminators.patchgan import PatchGAN
from fvq_jax.models.discriminators.stylegan import StyleGANDiscriminator
from fvq_jax.models.frozen.lpips import lpips_shapes
from fvq_jax.models.quantizers import QUANTIZERS, make_quantizer, quantizer_fields
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.ops.code_usage import level_statistics, perplexity, position_statistics, usage
from fvq_jax.ops.pixels import to_float
from fvq_jax.report.pictures import reconstruction_grid
from fvq_jax.report.tokenizer import Report, Trained, write_report
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.mesh import Rules, replicated
from fvq_jax.runtime.names import dotted
from fvq_jax.tasks.tokenizer import checks
from fvq_jax.tasks.tokenizer.evaluation import Evaluator, evaluation_networks
from fvq_jax.tasks.tokenizer.fields import fields, has_discriminator
from fvq_jax.tasks.tokenizer.losses import Losses
from fvq_jax.tasks.tokenizer.pictures import data_name, source_of
from fvq_jax.training.optim import Annealing, make_optimizer
from fvq_jax.training.state import TrainState
from fvq_jax.training.task import Evaluation, Gradients, Task

NETWORKS = ("tokenizer", "discriminator")
# The rules for arrays below /quantizer/ are the quantizer's own.
_RULES: Rules = (
    (r"/(encoder|decoder|quant_conv|post_quant_conv)/", P()),
    (r"^networks/discriminator/(params|variables)/", P()),
    (r"^networks/discriminator/opt_state/.*/(mu|nu)/", P()),
)


class TokenizerTask(Task):
    """Trains a tokenizer, with a discriminator if the config asks for one; the contract is `training.task.Task`."""

    unit: ClassVar[str] = "images"
    main: ClassVar[str] = "tokenizer"
    headline: ClassVar[Sequence[str]] = (
        "psnr",
        "ssim",
        "l1",
        "mse",
        "lpips_vgg",
        "rfid",
        "inception_score",
        "usage",
        "perplexity",
    )
    scores: ClassVar[Sequence[str]] = ("usage", "psnr")

    @classmethod
    def fields(cls, config: ConfigDict | None = None) -> dict[str, Field]:
        """The fields of `tasks/tokenizer/fields.py`, and those of the config's quantizer."""
        section = {} if config is None else config.get("tokenizer", {}).get("quantizer", {})
        name = section.get("name", "vector")
        found = fields(name)
        for other in QUANTIZERS:
            if other != name and set(section) == set(quantizer_fields(other)) != set(quantizer_fields(name)):
                raise InputError(
                    f"tokenizer.quantizer.name is {name}, and the other fields of the section are those of {other}: "
                    f'choose the quantizer in a config file, by use_quantizer(config, "{name}", ...), see '
                    "docs/quantizers.md"
                )
        return found

    @classmethod
    def check(cls, config: ConfigDict, devices: int) -> None:
        """See `tasks/tokenizer/checks.py`."""
        checks.check(config, devices)

    @classmethod
    def plannable(cls, config: ConfigDict, devices: int) -> dict[str, Any]:
        """The bundled photographs as data, whole, and an eval.batch_size that fits the devices."""
        named = ("train_dir", "eval_dir", "tfds_name", "tfds_dir", "train_split", "eval_split")
        pictures = {f"data.{name}": PICTURES[name].default for name in named}
        return {**pictures, "data.source": "photos", "eval.batch_size": devices, "eval.crops": 0}

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self._config, self._mesh = config, mesh
        model = config.tokenizer.to_dict()
        self.dtype = jnp.dtype(model.pop("dtype"))
        quantizer = make_quantizer(model.pop("quantizer"), dtype=self.dtype, mesh=mesh)
        levels = {name: tuple(model[name]) for name in ("ch_mult", "attention_levels")}
        self.net = TokenizerNet(quantizer, **model | levels, dtype=self.dtype)
        self.rules = (*((f"/quantizer/{pattern}", spec) for pattern, spec in quantizer.rules), *_RULES)
        self._sources: dict[str, Source] = {}
        loss, adversarial = config.loss, config.adversarial
        self.losses = Losses(
            self.net,
            self._discriminator(),
            reconstruction=loss.reconstruction,
            reconstruction_weight=loss.reconstruction_weight,
            perceptual_weight=loss.perceptual_weight,
            adversarial_loss=adversarial.loss,
            adversarial_weight=adversarial.weight,
            adversarial_start=adversarial.start,
            adaptive=adversarial.adaptive,
            decoder_only=config.optim.train_only == "decoder",
            dtype=self.dtype,
        )

    # --- networks -----------------------------------------------------------------------------------------------

    def _discriminator(self) -> PatchGAN | StyleGANDiscriminator | None:
        config = self._config
        if not has_discriminator(config):
            return None
        if config.adversarial.discriminator == "stylegan":
            return StyleGANDiscriminator(config.data.image_size, dtype=self.dtype)
        return PatchGAN(config.adversarial.ndf, config.adversarial.layers, self.dtype)

    def init(self, key: Shaped[Array, ""]) -> dict[str, dict[str, Any]]:
        """The variables of the tokenizer, and those of the discriminator if there is one."""
        keys = dict(zip(NETWORKS, jax.random.split(key), strict=True))
        size = self._config.data.image_size
        # Shapes of parameters do not depend on the batch; the search needs one token per device.
        image = jnp.zeros((self._mesh.size, size, size, 3), jnp.float32)
        networks = {"tokenizer": dict(self.net.init(keys["tokenizer"], image))}
        networks["tokenizer"].pop("intermediates", None)
        if self._config.init_from:
            networks["tokenizer"] |= self._state_of_trained(networks["tokenizer"])
        if self.losses.discriminator is not None:
            networks["discriminator"] = dict(self.losses.discriminator.init(keys["discriminator"], image, train=True))
        return networks

    def _state_of_trained(self, variables: dict[str, Any]) -> dict[str, Any]:
        state = {kind: value["quantizer"] for kind, value in variables.items() if kind != "params"}
        return {kind: {"quantizer": value} for kind, value in self.net.quantizer.state_of_trained(state).items()}

    def load(self, path: str) -> dict[str, Any]:
        """The parameters of a tokenizer of this architecture, in whatever form it was saved."""
        return load_params(path, self.net)

    def optimizers(self, annealing: Annealing) -> dict[str, optax.GradientTransformation]:
        """Adam for both; codebook and bridge at a rate of their own if the config gives one."""
        optim = self._config.optim
        adam = {"b1": optim.b1, "b2": optim.b2, "clip_norm": optim.clip_norm}
        rate, own = annealing.rate(optim.learning_rate), {}
        if optim.codebook_learning_rate > 0:
            own["quantizer"] = annealing.rate(optim.codebook_learning_rate, optim.codebook_decay)
        return {
            "tokenizer": make_optimizer(rate, own_rates=own, **adam),
            "discriminator": make_optimizer(rate, **adam),
        }

    # --- a step -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def frozen(self) -> dict[str, Any]:
        """The weights of LPIPS, if it is part of the loss. InputError if a file is missing or wrong."""
        loss = self._config.loss
        if loss.perceptual_weight == 0:
            return {}
        return {"lpips": jax.device_put(load_lpips(loss.vgg16_path, loss.lpips_path), replicated(self._mesh))}

    def abstract_frozen(self) -> dict[str, Any]:
        """Shapes, dtypes and layout of `frozen`."""
        layout = replicated(self._mesh)
        shapes = {"lpips": lpips_shapes()} if self._config.loss.perceptual_weight > 0 else {}
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), shapes)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Images and labels, as `data.pipeline.train_batches` yields them."""
        batch, size = self._config.batch_size, self._config.data.image_size
        return {
            "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def gradients(
        self, state: TrainState, batch: dict[str, Any], key: Shaped[Array, ""], frozen: dict[str, Any]
    ) -> Gradients:
        """Both networks' gradients from the same forward pass, each with respect to its own network only.

        Source of the recipe: arXiv 2509.10140.
        """
        losses, images = self.losses, to_float(batch["image"])
        active = state.step + 1 >= losses.adversarial_start
        tokenizer = state.networks["tokenizer"]
        critic = state.networks.get("discriminator")
        grad, (reconstruction, scalars, codes, variables, critic_variables) = jax.grad(losses.tokenizer, has_aux=True)(
            tokenizer.params,
            tokenizer.variables,
            None if critic is None else critic.all_variables(),
            images,
            active,
            key,
            frozen,
        )
        grads, all_variables = {"tokenizer": grad}, {"tokenizer": variables}
        if critic is not None:

            def learn(variables):
                grad, (term, variables) = jax.grad(losses.critic, has_aux=True)(
                    critic.params, variables, images, jax.lax.stop_gradient(reconstruction)
                )
                return grad, term, variables

            def rest(variables):
                return jax.tree.map(jnp.zeros_like, critic.params), jnp.float32(0), variables

            grads["discriminator"], scalars["loss/discriminator"], all_variables["discriminator"] = losses.if_active(
                active, learn, rest, critic_variables
            )
        return Gradients(grads, scalars, {"codes": self.net.quantizer.counts(codes)}, all_variables)

    def batch_scalars(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Usage of the codes in one step."""
        return {"usage/batch": usage(counts["codes"].sum(axis=0))}

    def tokens(self, images: int) -> int:
        """How many codes so many training images give."""
        side = self._config.data.image_size // self.net.downsampling
        return images * math.prod(self.net.quantizer.code_shape(side, side))

    def uncounted_flops(self, platform: str) -> tuple[float, float]:
        """The uncounted flops of the quantizer, see `Quantizer.uncounted_flops`."""
        return self.net.quantizer.uncounted_flops(self.tokens(self._config.batch_size), platform)

    # --- data ---------------------------------------------------------------------------------------------------

    def source(self, split: Literal["train", "eval"]) -> Source:
        """The pictures of the config."""
        if split not in self._sources:  # kept, since listing a large folder takes a while
            self._sources[split] = source_of(self._config, split)
        return self._sources[split]

    def batches(self, step: int) -> Batches:
        """Augmented crops, see `data.pipeline.train_batches`."""
        config = self._config
        return train_batches(
            self.source("train"),
            image_size=config.data.image_size,
            resize_min=config.data.resize_min,
            resize_max=config.data.resize_max,
            flip=config.data.flip,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
            max_unreadable=config.data.max_unreadable,
        )

    # --- figures ------------------------------------------------------------------------------------------------

    def window_scalars(self, counts: dict[str, np.ndarray]) -> dict[str, float]:
        """Usage and perplexity of the codes in the window, also by position and level; and how many tokens it held."""
        codes = counts["codes"].sum(axis=0)
        union = {
            "usage/window": float(usage(codes)),
            "perplexity/window": float(perplexity(codes)),
            "tokens/window": int(codes.sum()),
        }
        quantizer = self.net.quantizer
        union |= position_statistics(codes, quantizer.positions(), "window/")
        return union | level_statistics(counts["codes"], quantizer.level_names, quantizer.choices, "window/")

    def progress(self, scalars: Mapping[str, float]) -> dict[str, str]:
        """The total loss, and the usage of the codes in the window."""
        return {"loss": f"{scalars['loss/total']:.4f}", "usage": f"{scalars['usage/window']:.1%}"}

    def log_start(self) -> None:
        """Logs which losses are switched off."""
        if self._config.loss.perceptual_weight == 0:
            logging.info("no perceptual loss (loss.perceptual_weight=0): LPIPS is not used and needs no weight files")
        if self.losses.discriminator is None:
            logging.info("no adversarial loss (adversarial.weight=0 or optim.train_only=tokenizer): no discriminator")

    def open_files(self) -> None:
        """Opens the weights of LPIPS, and the networks of the evaluation."""
        _ = self.frozen, self.evaluator

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The programs that evaluate. InputError if a network's file is missing or damaged."""
        return Evaluator(self._config, self._mesh, self.net, self.source("eval"), evaluation_networks(self._config))

    def scored_variables(self, state: TrainState) -> dict[str, Any]:
        """What is evaluated and exported: parameters (their moving average if there is one) and all state."""
        tokenizer = state.networks["tokenizer"]
        return {"params": state.ema or tokenizer.params, **tokenizer.variables}

    def evaluate(self, state: TrainState, progress: Callable[[int], Any] = lambda done: None) -> Evaluation:
        """Reconstructs the evaluation set and scores it."""
        metrics, missing, found = self.evaluator.evaluate(self.scored_variables(state), progress)
        counted = {"images": int(found.sums.images), "tokens": int(found.sums.code_counts.sum())}
        counted["random_crops"] = self._config.eval.crops
        size = self.net.quantizer.size
        line = (
            f"PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}, {100 * metrics['usage']:.2f} % of {size} "
            f"codes used over {counted['tokens']} tokens, perplexity {metrics['perplexity']:.0f}"
        )
        pairs = [(example.original, example.reconstruction) for example in found.examples.spread]
        pictures = {}
        if pairs:
            pictures["reconstructions"] = reconstruction_grid(*map(np.stack, zip(*pairs, strict=True)))
        return Evaluation(
            metrics | counted, counted | {"codebook_size": size}, line, pictures, details=(metrics, missing, found)
        )

    def report(
        self, state: TrainState, evaluation: Evaluation, workdir: Path, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes `workdir/report/`."""
        plane = self.evaluator.plane(self.scored_variables(state))
        if jax.process_index() != 0:
            return
        config = self._config
        metrics, missing, found = evaluation.details
        facts = conditions(
            found, self.source("eval"), data=data_name(config), protocol="direct", size=config.data.image_size
        )
        report = Report(
            tokenizer=Trained.of(self.net.quantizer, self.net.downsampling),
            facts={"workdir": str(workdir), "step": int(state.step), **facts},
            metrics=metrics,
            not_computed=missing,
            found=found,
            plane=plane,
            rows=rows,
            batch_tokens=self.tokens(config.batch_size),
            config=dotted(config),
        )
        logging.info("report: %s", write_report(workdir, report))
