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

    @classmethod
    def of(cls, optim: Mapping[str, Any], total_steps: int, warmup_steps: int) -> "Annealing":
        """The schedule with the values of the section `optim` of a config."""
        ends = {"start": optim["start_factor"], "end": optim["end_factor"]}
        return cls(total_steps, warmup_steps, optim["hold"], optim["decay"], **ends)

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


class Guarded(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update(grads, state, params, finite=...)` leaves its state as it is unless `finite`.

    The updates are of no use then.
    """


def guarded(optimizer: optax.GradientTransformation) -> Guarded:
    """Any optimizer, guarded."""
    if isinstance(optimizer, Guarded):
        return optimizer

    def update(grads: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any) -> tuple[Any, Any]:
        updates, new = optimizer.update(grads, state, params)
        return updates, kept_unless(finite, new, state)

    return Guarded(optimizer.init, update)


def kept_unless(finite: Any, new: Any, old: Any) -> Any:
    """The arrays of `new` if `finite`, else those of `old`."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def make_optimizer(
    rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    clip_norm: float,
    own_rates: Mapping[str, optax.Schedule] | None = None,
    weight_decay: float | None = None,
    decayed: Callable[[str], bool] = lambda name: True,
) -> Guarded:
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
    first = [_clip(clip_norm) if clip_norm > 0 else optax.identity(), _adam(b1, b2)]
    if weight_decay is not None:

        def mask(params: Any) -> Any:
            return jax.tree.map_with_path(lambda path, _: decayed(path_name(path)), params)

        first.append(optax.add_decayed_weights(weight_decay, mask))
    if not own_rates:
        return _chained(*first, optax.scale_by_learning_rate(rate))

    def label(path: tuple[Any, ...], _: Any) -> str:
        return next((key.key for key in path if getattr(key, "key", None) in own_rates), "rest")

    rates = {name: optax.scale_by_learning_rate(schedule) for name, schedule in {"rest": rate, **own_rates}.items()}
    return _chained(*first, optax.partition(rates, lambda params: jax.tree.map_with_path(label, params)))


def _chained(*parts: optax.GradientTransformation) -> Guarded:
    chain = optax.chain(*map(guarded, parts))

    def update(grads: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any) -> tuple[Any, Any]:
        return chain.update(grads, state, params, finite=finite)

    return Guarded(chain.init, update)


def _clip(most: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of `most`, if theirs is larger.

    `optax.clip_by_global_norm` divides every gradient twice, so that a CPU stores the clipped ones; one factor for all
    is part of whatever reads them.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, most / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: factor * grad, grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _adam(b1: float, b2: float) -> Guarded:
    """`optax.scale_by_adam`, computing the updates from moments that have replaced the old ones already.

    On a CPU, XLA makes a program for every result, and each computes the new moments again from the old ones: these
    cannot be replaced as long as another program needs them, so they are copied first. A GPU or TPU computes all in one
    program, which for the barrier's sake becomes two: the moments, 2 of 7 arrays, are read once more.
    """
    adam, epsilon = optax.scale_by_adam(b1, b2), 1e-8

    def update(grads: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any) -> tuple[Any, Any]:
        new = jax.lax.optimization_barrier(kept_unless(finite, adam.update(grads, state, params)[1], state))
        means = optax.tree.bias_correction(new.mu, b1, new.count)
        squares = optax.tree.bias_correction(new.nu, b2, new.count)
        return jax.tree.map(lambda mean, square: mean / (jnp.sqrt(square) + epsilon), means, squares), new

    return Guarded(adam.init, update)
