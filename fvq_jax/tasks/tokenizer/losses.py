"""The losses of tokenizer training: of the tokenizer, and of the discriminator that judges it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fvq_jax.models.frozen.lpips import lpips_distance
from fvq_jax.models.layers import Conv
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.ops.adversarial import discriminator_loss, generator_loss

TINY = 1e-30  # latents that are all 0 have no relative error
MAX_ADAPTIVE_WEIGHT = 1e4
DECODER = ("post_quant_conv", "decoder")  # the parts of the tokenizer that `decoder_only` trains
Images = Float[Array, "b H W 3"]


@dataclasses.dataclass(frozen=True)
class Losses:
    """Both losses, as pure functions of parameters, variables and images in [-1, 1].

    Attributes:
      net: the tokenizer, whose quantizer says how its own terms are weighted.
      discriminator: None for training without adversarial loss.
      reconstruction: l2 or l1, with `reconstruction_weight`.
      perceptual_weight: of LPIPS, whose parameters are `frozen["lpips"]`; it computes in `dtype`.
      adversarial_loss, adversarial_weight: see `ops.adversarial`; the weight holds for both networks, as published.
      adversarial_start: the first step, counted from 1, at which the adversarial terms are not 0.
      adaptive: scales the tokenizer's adversarial term, see `adaptive_weight`.
      decoder_only: gradients reach only the parts in `DECODER`, and the quantizer's state stays as it is.
    """

    net: TokenizerNet
    discriminator: nn.Module | None
    reconstruction: str
    reconstruction_weight: float
    perceptual_weight: float
    adversarial_loss: str
    adversarial_weight: float
    adversarial_start: int
    adaptive: bool
    decoder_only: bool
    dtype: DTypeLike

    def tokenizer(
        self,
        params: dict[str, Any],
        variables: dict[str, Any],
        critic: dict[str, Any] | None,
        images: Images,
        active: Any,
        key: Any,
        frozen: dict[str, Any],
    ) -> tuple[Any, tuple[Images, dict[str, Any], Any, dict[str, Any], dict[str, Any]]]:
        """The total loss of the tokenizer, to be differentiated with respect to `params`.

        Args:
          params, variables: of the tokenizer; `variables` is all but the parameters.
          critic: all variables of the discriminator; None without one.
          images: the batch.
          active: whether the adversarial term counts already.
          key: for quantizers that draw random numbers.
          frozen: weights of LPIPS.

        Returns:
          The total, and (reconstruction, terms by name, codes, the variables of the tokenizer and those of the
          discriminator after the call).
        """
        if self.decoder_only:
            params = {n: p if n in DECODER else jax.lax.stop_gradient(p) for n, p in params.items()}
        # Only the state of the quantizer depends on `train`, and a decoder learns what codes mean that stay.
        output, mutated = self.net.apply(
            {"params": params, **variables},
            images,
            train=not self.decoder_only,
            key=key,
            mutable=["intermediates", *variables],
        )
        changed = dict(mutated)
        captured = changed.pop("intermediates", {})
        quantized, total, terms = output.quantized, jnp.float32(0), {}
        for name, weight in self.net.quantizer.loss_weights.items():
            terms[f"loss/{name}"] = quantized.losses[name]
            total += weight * quantized.losses[name]
        image_loss, image_terms = self.image(output.reconstruction, images, frozen)
        terms |= image_terms
        total += image_loss
        critic_variables: dict[str, Any] = {}
        if critic is not None:

            def with_adversary(reconstruction):
                term, variables = self.adversarial(critic, reconstruction)
                weight = jnp.float32(self.adversarial_weight)
                if self.adaptive:
                    features = captured["decoder"]["last_features"][0]
                    weight *= self.adaptive_weight(params, features, reconstruction, images, critic, frozen)
                return term, weight, variables

            def without(reconstruction):
                return jnp.float32(0), jnp.float32(self.adversarial_weight), _all_but_params(critic)

            term, weight, critic_variables = self.if_active(active, with_adversary, without, output.reconstruction)
            terms["loss/adversarial"] = term
            if self.adaptive:
                terms["adversarial_weight"] = weight
            total += jnp.where(active, weight, 0) * term
        terms["loss/total"] = total
        error, power = jnp.mean(output.error), jnp.mean(output.power)
        terms |= {"quantization/error": error, "quantization/relative_error": error / jnp.maximum(power, TINY)}
        return total, (output.reconstruction, terms, quantized.codes, changed, critic_variables)

    def image(self, reconstruction: Images, images: Images, frozen: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The weighted pixel and perceptual loss, and the unweighted terms."""
        error = reconstruction - images
        pixels = jnp.mean(jnp.square(error) if self.reconstruction == "l2" else jnp.abs(error))
        total, terms = self.reconstruction_weight * pixels, {"loss/reconstruction": pixels}
        if self.perceptual_weight > 0:
            terms["loss/perceptual"] = jnp.mean(
                lpips_distance(frozen["lpips"], images, reconstruction, dtype=self.dtype)
            )
            total += self.perceptual_weight * terms["loss/perceptual"]
        return total, terms

    def adversarial(self, critic: dict[str, Any], reconstruction: Images) -> tuple[Any, dict[str, Any]]:
        """The tokenizer's adversarial term, and the discriminator's variables after the call."""
        logits, variables = self._logits(critic, reconstruction)
        return generator_loss(self.adversarial_loss, logits), variables

    def adaptive_weight(
        self,
        params: dict[str, Any],
        features: Any,
        reconstruction: Images,
        images: Images,
        critic: dict[str, Any],
        frozen: dict[str, Any],
    ) -> Any:
        """|gradient of the image loss| / |gradient of the adversarial term| at the decoder's last kernel.

        Source: arXiv 2012.09841, Eq. 7. No gradient flows through it.
        """
        last = jax.lax.stop_gradient(params["decoder"]["conv_out"])
        features, reconstruction = jax.lax.stop_gradient((features, reconstruction))

        def at_kernel(gradient):
            layer = Conv(3)
            _, pull = jax.vjp(lambda p: layer.apply({"params": p}, features.astype(jnp.float32)), last)
            return optax.tree.norm(pull(gradient)[0]["conv"]["kernel"])

        of_image = jax.grad(lambda r: self.image(r, images, frozen)[0])(reconstruction)
        of_adversary = jax.grad(lambda r: self.adversarial(critic, r)[0])(reconstruction)
        ratio = at_kernel(of_image) / (at_kernel(of_adversary) + 1e-4)
        return jax.lax.stop_gradient(jnp.clip(ratio, 0, MAX_ADAPTIVE_WEIGHT))

    def critic(
        self, params: dict[str, Any], variables: dict[str, Any], images: Images, reconstruction: Images
    ) -> tuple[Any, tuple[Any, dict[str, Any]]]:
        """The weighted loss of the discriminator, to be differentiated, and (unweighted term, variables).

        Real and reconstructed images go through in two calls, each a batch of its own for BatchNorm.
        """
        real, variables = self._logits({"params": params, **variables}, images)
        fake, variables = self._logits({"params": params, **variables}, reconstruction)
        term = discriminator_loss(self.adversarial_loss, real, fake)
        return self.adversarial_weight * term, (term, variables)

    def if_active(self, active: Any, yes: Callable[[Any], Any], no: Callable[[Any], Any], operand: Any) -> Any:
        """Calls `yes` if `active`, else `no`, so that before `adversarial_start` the discriminator costs nothing."""
        if self.adversarial_start <= 1:  # always active; in a branch, convolutions on a CPU are 50 times slower
            return yes(operand)
        return jax.lax.cond(active, yes, no, operand)

    def _logits(self, variables, images):
        if self.discriminator is None:
            raise ValueError("without a discriminator there is no adversarial loss")
        logits, changed = self.discriminator.apply(
            variables, images, train=True, mutable=list(_all_but_params(variables))
        )
        return logits, dict(changed)


def _all_but_params(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name != "params"}
