"""The learning-rate schedule (in the paper: learning annealing) and the optimizers, in Optax."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fvq_jax.config.fields import DECAYS
from fvq_jax.runtime.names import path_name


def learning_annealing(
    total_steps: int,
    warmup_steps: int,
    *,
    hold: float = 0.3,
    decay: str = "linear",
    start: float = 0.005,
    end: float = 0.01,
) -> optax.Schedule:
    """The multiplier of the learning rate at every step, counted from 0 (arXiv 2509.10140).

    Rises linearly from `start` to 1 over the warm-up, stays 1 for the share `hold` of the steps that remain,
    then falls to `end` at step total_steps - 1, linearly or along a cosine; `constant` never falls.

    Raises:
      ValueError: an unknown decay, hold outside [0, 1), a warm-up that leaves no step, no steps at all.
    """
    if decay not in DECAYS:
        raise ValueError(f"unknown decay {decay!r}: use one of {', '.join(DECAYS)}")
    if not 0 <= hold < 1:
        raise ValueError(f"hold must be in [0, 1), not {hold}")
    if total_steps < 1 or not 0 <= warmup_steps < total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps does not fit into {total_steps} steps")

    def multiplier(step):
        step = jnp.asarray(step, jnp.float32)
        rising = start + (1 - start) * step / max(warmup_steps, 1)
        passed = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
        left = jnp.clip((1 - passed) / (1 - hold), 0, 1)  # 1 while held, 0 at the last step
        if decay == "constant":
            left = jnp.ones_like(left)
        elif decay == "cosine":
            left = 0.5 - 0.5 * jnp.cos(jnp.pi * left)
        return jnp.where(step < warmup_steps, rising, end + (1 - end) * left)

    return multiplier


@dataclasses.dataclass(frozen=True)
class Annealing:
    """The learning-rate schedule of a run, from which every optimizer takes its rate; see `learning_annealing`."""

    total_steps: int
    warmup_steps: int
    hold: float = 0.3
    decay: str = "linear"
    start: float = 0.005
    end: float = 0.01

    def rate(self, peak: float, decay: str | None = None) -> optax.Schedule:
        """The schedule `peak * multiplier(step)`; `decay`, if given, replaces the run's."""
        multiplier = learning_annealing(
            self.total_steps,
            self.warmup_steps,
            hold=self.hold,
            decay=decay or self.decay,
            start=self.start,
            end=self.end,
        )
        return lambda step: peak * multiplier(step)


def make_optimizer(
    rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    clip_norm: float,
    own_rates: Mapping[str, optax.Schedule] | None = None,
    weight_decay: float | None = None,
    decayed: Callable[[str], bool] = lambda name: True,
) -> optax.GradientTransformation:
    """Adam after clipping by the global gradient norm of the network; `clip_norm` 0 leaves gradients as they are.

    Args:
      rate: the learning rate at every step.
      b1, b2: Adam's decays; its epsilon is 1e-8.
      clip_norm: the largest gradient norm.
      own_rates: gives modules, such as "quantizer", a schedule of their own: all parameters below that name follow it,
        and all others follow `rate`.
      weight_decay: AdamW (arXiv 1711.05101): every step also shrinks a parameter by the rate times this share of it.
        None: plain Adam. The optimizer's state has one more part with a number, 0 included, than with None.
      decayed: whether the parameter with this path, such as "layers/wqkv", is shrunk.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    first = [clip, optax.scale_by_adam(b1, b2)]
    if weight_decay is not None:

        def mask(params: Any) -> Any:
            return jax.tree.map_with_path(lambda path, _: decayed(path_name(path)), params)

        first.append(optax.add_decayed_weights(weight_decay, mask))
    if not own_rates:
        return optax.chain(*first, optax.scale_by_learning_rate(rate))

    def label(path: tuple[Any, ...], _: Any) -> str:
        return next((key.key for key in path if getattr(key, "key", None) in own_rates), "rest")

    rates = {name: optax.scale_by_learning_rate(schedule) for name, schedule in {"rest": rate, **own_rates}.items()}
    return optax.chain(*first, optax.partition(rates, lambda params: jax.tree.map_with_path(label, params)))
