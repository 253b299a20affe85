"""One training step of any task: micro-batches, guard against values that are not finite, update, moving average."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped
from ml_collections import ConfigDict

from fvq_jax.runtime.cpu_devices import compiler_options
from fvq_jax.runtime.mesh import BATCH, replicated
from fvq_jax.training.optim import Annealing, Guarded, guarded, kept_unless
from fvq_jax.training.state import NetworkState, TrainState, abstract_state
from fvq_jax.training.task import Task


@struct.dataclass
class StepMetrics:
    """What a training step reports: float32 scalars by name, and the task's counts, which add up over steps."""

    scalars: dict[str, Any]
    counts: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A task's training step on one mesh.

    Attributes:
      task, mesh: those of the run.
      optimizers: by network.
      rate: the learning rate at every step, to be logged.
      seed: gives the random keys: step_key = fold_in(key(seed), step), and fold_in(step_key, i) for micro-batch i.
      accumulate: how many micro-batches make a step.
      ema_decay: decay of the moving average of the main network's parameters; 0: there is no average.
    """

    task: Task
    mesh: Mesh
    optimizers: Mapping[str, Guarded]
    rate: optax.Schedule
    seed: int = 0
    accumulate: int = 1
    ema_decay: float = 0.0

    @classmethod
    def of(cls, task: Task, config: ConfigDict, mesh: Mesh, total_steps: int, warmup_steps: int) -> "TrainStep":
        """Makes the step of a run from its config and its length."""
        optim = config.optim
        annealing = Annealing.of(optim.to_dict(), total_steps, warmup_steps)
        return cls(
            task,
            mesh,
            {name: guarded(optimizer) for name, optimizer in task.optimizers(annealing).items()},
            annealing.rate(optim.learning_rate),
            seed=config.seed,
            accumulate=optim.accumulate,
            ema_decay=optim.ema_decay,
        )

    def init(self, key: Shaped[Array, ""]) -> TrainState:
        """The state at step 0."""
        networks = {}
        for name, variables in self.task.init(key).items():
            params = variables.pop("params")
            networks[name] = NetworkState(params, self.optimizers[name].init(params), variables)
        zero = jnp.zeros((), jnp.int32)
        # A copy, so that parameters and average never share a buffer that a step donates.
        ema = jax.tree.map(jnp.copy, networks[self.task.main].params) if self.ema_decay > 0 else {}
        return TrainState(zero, zero, networks, ema)

    def abstract(self) -> TrainState:
        """Shapes, dtypes and layout of the state."""
        return self._abstract

    @functools.cached_property
    def _abstract(self) -> TrainState:
        return abstract_state(self.init, self.mesh, self.task.rules)

    def __call__(
        self, state: TrainState, batch: dict[str, Array], frozen: dict[str, Any]
    ) -> tuple[TrainState, StepMetrics]:
        """One update of all networks, each with gradients at the parameters before the step.

        If any scalar or gradient norm is not finite, the step changes only the counters `step` and `skipped`; the
        scalars show which one it was. A pure function, to be jitted.
        """
        grads, scalars, counts, variables = self._accumulated(state, batch, frozen)
        for name, grad in grads.items():
            scalars[f"grad_norm/{name}"] = optax.tree.norm(grad)
        finite = jnp.all(jnp.array([jnp.isfinite(value) for value in scalars.values()]))

        networks = {}
        for name, network in state.networks.items():
            optimizer, before = self.optimizers[name], (network.params, network.variables)
            updates, opt_state = optimizer.update(grads[name], network.opt_state, network.params, finite=finite)
            after = optax.apply_updates(network.params, updates), variables[name]
            params, changed = kept_unless(finite, after, before)
            # The barrier has the same reason as in `optim`: the moving average is computed from the parameters.
            networks[name] = NetworkState(jax.lax.optimization_barrier(params), opt_state, changed)
        ema = state.ema
        if self.ema_decay > 0:
            # In this form the average of a parameter that never changes is equal to it, to the last bit.
            share = 1 - self.ema_decay
            average = jax.tree.map(lambda old, new: old + share * (new - old), ema, networks[self.task.main].params)
            ema = kept_unless(finite, average, ema)
        scalars["learning_rate"] = self.rate(state.step - state.skipped)
        scalars |= self.task.batch_scalars(counts)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        scalars["skipped_steps"] = skipped.astype(jnp.float32)
        return TrainState(state.step + 1, skipped, networks, ema), StepMetrics(scalars, counts)

    def jitted(self, state: TrainState) -> jax.stages.Wrapped:
        """The step under jit, for states with the layout of `state`: it donates the old one and returns a new one."""
        layout = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(self.mesh))
        options = compiler_options(self.mesh)
        return jax.jit(self.__call__, donate_argnums=0, out_shardings=layout, compiler_options=options)

    def _accumulated(self, state, batch, frozen):
        """Means of gradients and scalars over the micro-batches, sums of counts, variables after the last one."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        def gradients(variables, micro_batch, index):
            found = self.task.gradients(
                state.with_variables(variables), micro_batch, jax.random.fold_in(key, index), frozen
            )
            return found.grads, found.scalars, found.counts, found.variables

        variables = {name: network.variables for name, network in state.networks.items()}
        if self.accumulate == 1:
            return gradients(variables, batch, 0)

        def step(carry, micro_batch):
            total, variables = carry
            grads, scalars, counts, variables = gradients(variables, *micro_batch)
            return (jax.tree.map(jnp.add, total, (grads, scalars, counts)), variables), None

        micro_batches = jax.tree.map(self._split, batch)
        first = jax.tree.map(lambda rows: rows[0], micro_batches)
        shapes = jax.eval_shape(gradients, variables, first, 0)[:3]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ((grads, scalars, counts), variables), _ = jax.lax.scan(
            step, (zeros, variables), (micro_batches, jnp.arange(self.accumulate))
        )
        grads, scalars = jax.tree.map(lambda leaf: leaf / self.accumulate, (grads, scalars))
        return grads, scalars, counts, variables

    def _split(self, rows: Shaped[Array, "b ..."]) -> Shaped[Array, "a m ..."]:
        """Cuts rows into micro-batches, strided so that every device keeps its own rows."""
        a = self.accumulate
        split = rows.reshape(rows.shape[0] // a, a, *rows.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(split, NamedSharding(self.mesh, PartitionSpec(None, *BATCH)))
