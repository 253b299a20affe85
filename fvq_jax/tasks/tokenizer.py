"""The task of training a tokenizer: its networks, its two losses, one training step and one evaluation step.

A task is what `train.py` drives: `init(key)`, `train_step(state, batch, frozen)`, `eval_step(...)`. All methods
that take arrays are pure and meant to be jitted.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped, UInt8
from ml_collections import ConfigDict

from fvq_jax.config import downsampling, has_discriminator
from fvq_jax.models.discriminator import PatchGAN
from fvq_jax.models.discriminator_stylegan import StyleGANDiscriminator
from fvq_jax.models.layers import Conv
from fvq_jax.models.lpips import load_lpips, lpips_distance, lpips_shapes
from fvq_jax.models.tokenizer import TokenizerNet, fold_bridge
from fvq_jax.ops.adversarial import discriminator_loss, generator_loss
from fvq_jax.ops.code_statistics import code_histogram, usage
from fvq_jax.ops.nearest import runs_kernel
from fvq_jax.ops.nearest_xla import BLOCK_SIZE
from fvq_jax.optim import learning_annealing, make_optimizer, scaled
from fvq_jax.sharding import replicated
from fvq_jax.state import NetworkState, TrainState

MAX_ADAPTIVE_WEIGHT = 1e4
DECODER = ("post_quant_conv", "decoder")  # what optim.train_only="decoder" trains


@struct.dataclass
class StepMetrics:
    """What a training step reports: named float32 scalars, and how often each code was chosen (int32 [k])."""

    scalars: dict[str, Any]
    code_counts: Any


def to_float(images: UInt8[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    """uint8 pixels to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def abstract_frozen(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Shapes, dtypes and layout of a task's `frozen`, for compiling a step without the weight files."""
    layout = replicated(mesh)
    shapes = {"lpips": lpips_shapes()} if config.loss.perceptual_weight > 0 else {}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), shapes)


class TokenizerTask:
    """Networks, losses and optimizers of one configuration on one mesh.

    Args:
      config: a validated configuration.
      mesh: axes `data` and `codebook`.
      total_steps, warmup_steps: of the learning annealing.
      frozen: what `train_step` takes as `frozen`, if not the weights from files, see `abstract_frozen`.

    Raises:
      InputError: LPIPS is asked for and a weight file is missing or wrong.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, total_steps: int, warmup_steps: int, frozen: dict | None = None):
        self.mesh = mesh
        self.loss, self.adversarial, self.optim = config.loss, config.adversarial, config.optim
        self.skip_nan = config.on_nan == "skip"
        model = config.tokenizer.to_dict()
        dtype = jnp.dtype(model.pop("dtype"))
        temperature = config.loss.entropy_temperature if config.loss.entropy_weight > 0 else None
        self.net = TokenizerNet(**model, dtype=dtype, entropy_temperature=temperature, mesh=mesh)
        self.codebook_size = config.tokenizer.codebook_size
        self.downsampling = downsampling(config)
        self.image_shape = (1, config.data.image_size, config.data.image_size, 3)
        self.discriminator = None
        if has_discriminator(config):
            if config.adversarial.discriminator == "stylegan":
                self.discriminator = StyleGANDiscriminator(config.data.image_size, dtype=dtype)
            else:
                self.discriminator = PatchGAN(config.adversarial.ndf, config.adversarial.layers, dtype)
        self.frozen = {} if frozen is None else frozen
        if config.loss.perceptual_weight > 0 and frozen is None:
            weights = load_lpips(config.loss.vgg16_path, config.loss.lpips_path)
            self.frozen["lpips"] = jax.device_put(weights, replicated(mesh))
        self.dtype = dtype

        def schedule(rate, decay):
            annealing = learning_annealing(
                total_steps,
                warmup_steps,
                hold=config.optim.hold,
                decay=decay,
                start=config.optim.start_factor,
                end=config.optim.end_factor,
            )
            return scaled(rate, annealing)

        optim = config.optim
        self.rate = schedule(optim.learning_rate, optim.decay)
        codebook_rate = None
        if optim.codebook_learning_rate > 0:
            codebook_rate = schedule(optim.codebook_learning_rate, optim.codebook_decay)
        adam = {"b1": optim.b1, "b2": optim.b2, "clip_norm": optim.clip_norm}
        self.optimizers = {
            "tokenizer": make_optimizer(self.rate, codebook_rate=codebook_rate, **adam),
            "discriminator": make_optimizer(self.rate, **adam),
        }

    def init(self, key: Shaped[Array, ""]) -> TrainState:
        """The state at step 0."""
        keys = dict(zip(("tokenizer", "discriminator"), jax.random.split(key), strict=True))
        # Shapes of parameters do not depend on the batch; the search needs one token per device.
        image = jnp.zeros((self.mesh.size, *self.image_shape[1:]), jnp.float32)
        networks = {}
        params = self.net.init(keys["tokenizer"], image)["params"]
        networks["tokenizer"] = NetworkState(params, self.optimizers["tokenizer"].init(params), {})
        if self.discriminator is not None:
            variables = self.discriminator.init(keys["discriminator"], image, train=True)
            networks["discriminator"] = NetworkState(
                variables["params"],
                self.optimizers["discriminator"].init(variables["params"]),
                variables.get("batch_stats", {}),
            )
        zero = jnp.zeros((), jnp.int32)
        # A copy, so that state and average never share a buffer that a step donates.
        ema = jax.tree.map(jnp.copy, params) if self.optim.ema_decay > 0 else {}
        return TrainState(zero, zero, networks, ema)

    def train_step(self, state: TrainState, batch: dict[str, Array], frozen: dict) -> tuple[TrainState, StepMetrics]:
        """One update of both networks from the same forward pass.

        Both gradients are taken at the parameters before the step, each with respect to its own network only. A
        step in which any loss or gradient norm is not finite changes nothing but the step count; its scalars
        tell which. Source of the recipe: arXiv 2509.10140.
        """
        micro_batches = self._split(batch["image"])
        grads, scalars, counts, stats = self._accumulate(state, micro_batches, frozen)
        for name, grad in grads.items():
            scalars[f"grad_norm/{name}"] = optax.tree.norm(grad)
        finite = jnp.all(jnp.array([jnp.isfinite(value) for value in scalars.values()]))

        networks = {}
        for name, network in state.networks.items():
            updates, opt_state = self.optimizers[name].update(grads[name], network.opt_state, network.params)
            params = optax.apply_updates(network.params, updates)
            networks[name] = NetworkState(params, opt_state, stats[name])
        ema = state.ema
        if self.optim.ema_decay > 0:
            # In this form the average of a parameter that never moves is that parameter, to the last bit.
            step = 1 - self.optim.ema_decay
            ema = jax.tree.map(lambda old, new: old + step * (new - old), ema, networks["tokenizer"].params)
        networks, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (networks, ema), (state.networks, state.ema)
        )
        scalars["learning_rate"] = self.rate(state.step - state.skipped)
        scalars["usage/batch"] = usage(counts)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        scalars["skipped_steps"] = skipped.astype(jnp.float32)
        state = TrainState(state.step + 1, skipped, networks, ema)
        return state, StepMetrics(scalars, counts)

    def jitted_step(self, state: TrainState) -> Callable:
        """`train_step` under jit: `state` (or one of this layout) is donated, the next one is laid out as it is."""
        layout = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(self.mesh))
        return jax.jit(self.train_step, donate_argnums=0, out_shardings=layout)

    def eval_params(self, state: TrainState) -> dict:
        """The parameters that are evaluated and exported: the moving average if there is one, the bridge folded."""
        params = state.ema if self.optim.ema_decay > 0 else state.networks["tokenizer"].params
        return fold_bridge(self.net, params)[1]

    def eval_step(
        self, params: dict, images: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b H W 3"], Int[Array, "b h w"]]:
        """Reconstructions, in [-1, 1], and codes, by what `eval_params` returned.

        In float32 whatever the training computes in, as the exported tokenizer does.
        """
        net = self.net.clone(bridge="none", entropy_temperature=None, dtype=jnp.float32)
        output = net.apply({"params": params}, to_float(images))
        return jnp.clip(output.reconstruction, -1, 1), output.quantized.codes

    def tokens(self, images: int) -> int:
        """Codes that so many training images become."""
        return images * math.prod(self.image_shape[1:3]) // self.downsampling**2

    def uncounted_flops(self, batch_size: int) -> float:
        """Flops of a step's search that XLA's count leaves out, over all devices.

        It does not see into a kernel, and counts the loop over blocks of codes as if it ran once.
        """
        search = 2 * self.tokens(batch_size) * self.codebook_size * self.net.code_dim
        if runs_kernel(self.net.search_implementation, self.mesh.devices.flat[0].platform):
            return search
        blocks = max(self.codebook_size / self.mesh.shape["codebook"] / BLOCK_SIZE, 1)
        counted = min(2, blocks)  # the first block stands outside the loop
        return search * (1 - counted / blocks)

    # --- the losses ---------------------------------------------------------------------------------------------

    def _tokenizer_loss(self, params, discriminator, images, active, frozen):
        """Total loss of the tokenizer, and (reconstruction, named terms, code counts, statistics)."""
        if self.optim.train_only == "decoder":
            params = {n: p if n in DECODER else jax.lax.stop_gradient(p) for n, p in params.items()}
        output, captured = self.net.apply({"params": params}, images, mutable=["intermediates"])
        quantized, loss = output.quantized, self.loss
        terms = {
            "loss/codebook": quantized.codebook_loss,
            "loss/commitment": quantized.commitment_loss,
        }
        total = loss.codebook_weight * quantized.codebook_loss + loss.commitment_weight * quantized.commitment_loss
        if loss.entropy_weight > 0:
            terms["loss/entropy"] = quantized.entropy_loss
            total += loss.entropy_weight * quantized.entropy_loss
        image_loss, image_terms = self._image_loss(output.reconstruction, images, frozen)
        terms |= image_terms
        total += image_loss
        stats = {}
        if discriminator is not None:

            def with_adversary(reconstruction):
                term, stats = self._fool(discriminator, reconstruction)
                weight = jnp.float32(self.adversarial.weight)
                if self.adversarial.adaptive:
                    features = captured["intermediates"]["decoder"]["last_features"][0]
                    weight *= self._adaptive_weight(params, features, reconstruction, images, discriminator, frozen)
                return term, weight, stats

            def without(reconstruction):
                return jnp.float32(0), jnp.float32(self.adversarial.weight), discriminator["batch_stats"]

            term, weight, stats = self._if_active(active, with_adversary, without, output.reconstruction)
            terms["loss/adversarial"] = term
            if self.adversarial.adaptive:
                terms["adversarial_weight"] = weight
            total += jnp.where(active, weight, 0) * term
        terms["loss/total"] = total
        counts = code_histogram(quantized.codes, self.codebook_size)
        return total, (output.reconstruction, terms, counts, stats)

    def _image_loss(self, reconstruction, images, frozen):
        """The weighted pixel and perceptual loss, and the unweighted terms."""
        error = reconstruction - images
        pixels = jnp.mean(jnp.square(error) if self.loss.reconstruction == "l2" else jnp.abs(error))
        total, terms = self.loss.reconstruction_weight * pixels, {"loss/reconstruction": pixels}
        if self.loss.perceptual_weight > 0:
            terms["loss/perceptual"] = jnp.mean(
                lpips_distance(frozen["lpips"], images, reconstruction, dtype=self.dtype)
            )
            total += self.loss.perceptual_weight * terms["loss/perceptual"]
        return total, terms

    def _if_active(self, active, yes, no, operand):
        """A choice between two branches: before its first step the discriminator costs nothing."""
        if self.adversarial.start <= 1:  # no choice; in a branch XLA's convolutions on a CPU are 50 times slower
            return yes(operand)
        return jax.lax.cond(active, yes, no, operand)

    def _fool(self, discriminator, reconstruction):
        """The tokenizer's adversarial term, and the discriminator's statistics after the call."""
        logits, stats = self._logits(discriminator, reconstruction)
        return generator_loss(self.adversarial.loss, logits), stats

    def _logits(self, variables, images):
        logits, updated = self.discriminator.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updated.get("batch_stats", {})

    def _adaptive_weight(self, params, features, reconstruction, images, discriminator, frozen):
        """|gradient of the image loss| / |gradient of the adversarial term| at the decoder's last kernel.

        Source: arXiv 2012.09841, Eq. 7. No gradient flows through it.
        """
        last = jax.lax.stop_gradient(params["decoder"]["conv_out"])
        features, reconstruction = jax.lax.stop_gradient((features, reconstruction))

        def at_kernel(gradient):
            layer = Conv(3)
            _, pull = jax.vjp(lambda p: layer.apply({"params": p}, features.astype(jnp.float32)), last)
            return optax.tree.norm(pull(gradient)[0]["conv"]["kernel"])

        of_image = jax.grad(lambda r: self._image_loss(r, images, frozen)[0])(reconstruction)
        of_adversary = jax.grad(lambda r: self._fool(discriminator, r)[0])(reconstruction)
        ratio = at_kernel(of_image) / (at_kernel(of_adversary) + 1e-4)
        return jax.lax.stop_gradient(jnp.clip(ratio, 0, MAX_ADAPTIVE_WEIGHT))

    def _discriminator_loss(self, params, stats, images, reconstruction):
        """Weighted loss, and (the unweighted term, statistics); real and fake in two calls, each its own batch."""
        real, stats = self._logits({"params": params, "batch_stats": stats}, images)
        fake, stats = self._logits({"params": params, "batch_stats": stats}, reconstruction)
        term = discriminator_loss(self.adversarial.loss, real, fake)
        return self.adversarial.weight * term, (term, stats)

    # --- gradients ----------------------------------------------------------------------------------------------

    def _gradients(self, state, stats, images, frozen):
        """Gradients of both networks, named terms, code counts and statistics for one micro-batch."""
        images = to_float(images)
        active = state.step + 1 >= self.adversarial.start
        tokenizer = state.networks["tokenizer"].params
        critic = state.networks.get("discriminator")
        variables = None if critic is None else {"params": critic.params, "batch_stats": stats["discriminator"]}
        grad, (reconstruction, terms, counts, critic_stats) = jax.grad(self._tokenizer_loss, has_aux=True)(
            tokenizer, variables, images, active, frozen
        )
        grads, stats = {"tokenizer": grad}, {"tokenizer": {}}
        if critic is not None:

            def learn(critic_stats):
                grad, (term, critic_stats) = jax.grad(self._discriminator_loss, has_aux=True)(
                    critic.params, critic_stats, images, jax.lax.stop_gradient(reconstruction)
                )
                return grad, term, critic_stats

            def rest(critic_stats):
                return jax.tree.map(jnp.zeros_like, critic.params), jnp.float32(0), critic_stats

            grads["discriminator"], terms["loss/discriminator"], stats["discriminator"] = self._if_active(
                active, learn, rest, critic_stats
            )
        return grads, terms, counts, stats

    def _accumulate(self, state, micro_batches, frozen):
        """Means of gradients and terms over the micro-batches, sums of code counts, the last statistics."""
        stats = {name: network.batch_stats for name, network in state.networks.items()}
        if len(micro_batches) == 1:
            return self._gradients(state, stats, micro_batches[0], frozen)

        def step(carry, images):
            grads, terms, counts, stats = self._gradients(state, carry[1], images, frozen)
            total = jax.tree.map(jnp.add, carry[0], (grads, terms, counts))
            return (total, stats), None

        shapes = jax.eval_shape(self._gradients, state, stats, micro_batches[0], frozen)[:3]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ((grads, terms, counts), stats), _ = jax.lax.scan(step, (zeros, stats), micro_batches)
        grads, terms = jax.tree.map(lambda leaf: leaf / len(micro_batches), (grads, terms))
        return grads, terms, counts, stats

    def _split(self, images: UInt8[Array, "b H W 3"]) -> UInt8[Array, "a m H W 3"]:
        """The batch as `accumulate` micro-batches, strided so that every device keeps its own images."""
        a = self.optim.accumulate
        split = images.reshape(images.shape[0] // a, a, *images.shape[1:]).swapaxes(0, 1)
        layout = PartitionSpec(None, ("data", "codebook"))
        return jax.lax.with_sharding_constraint(split, jax.sharding.NamedSharding(self.mesh, layout))
