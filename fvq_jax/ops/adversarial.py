"""Adversarial losses on discriminator logits; pure functions of arrays.

When the adversarial terms start, how they are weighted and which network receives their gradient is left to the task.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def discriminator_loss(
    kind: str, real_logits: Float[Array, "..."], fake_logits: Float[Array, "..."]
) -> Float[Array, ""]:
    """Loss that the discriminator minimises: half the sum of its means over real and over fake logits, in float32.

    `hinge`: max(0, 1 - real), max(0, 1 + fake) (arXiv 1705.02894). `vanilla` and `non_saturating`: logistic,
    softplus(-real), softplus(fake) (arXiv 1406.2661); these two differ only in the generator's loss. ValueError for
    another `kind`.
    """
    loss, _ = _losses(kind)
    return 0.5 * (loss(real_logits.astype(jnp.float32)) + loss(-fake_logits.astype(jnp.float32)))


def generator_loss(kind: str, fake_logits: Float[Array, "..."]) -> Float[Array, ""]:
    """Loss that the generator minimises, in float32.

    `hinge` and `vanilla`: mean of -fake, which VQGAN uses with both (arXiv 2012.09841); `non_saturating`: mean of
    softplus(-fake) (arXiv 1406.2661). ValueError for another `kind`.
    """
    _, loss = _losses(kind)
    return loss(fake_logits.astype(jnp.float32))


def _hinge(logits: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.mean(jax.nn.relu(1 - logits))


def _logistic(logits: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.mean(jax.nn.softplus(-logits))


def _linear(logits: Float[Array, "..."]) -> Float[Array, ""]:
    return -jnp.mean(logits)


# kind -> (discriminator's loss of logits that should be positive, generator's loss of fake logits)
ADVERSARIAL_LOSSES = {
    "hinge": (_hinge, _linear),
    "vanilla": (_logistic, _linear),
    "non_saturating": (_logistic, _logistic),
}


def _losses(kind: str) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"unknown adversarial loss {kind!r}; known: {', '.join(ADVERSARIAL_LOSSES)}")
    return ADVERSARIAL_LOSSES[kind]
