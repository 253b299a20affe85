"""What one training step of a task needs and how fast it can be, read from the step compiled ahead of time.

`runtime.compiled_cost` reads the compiled program; `runtime.chips` knows what a chip can do.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from fvq_jax.config.checks import validate
from fvq_jax.runtime import chips, compiled_cost
from fvq_jax.runtime.mesh import BATCH, make_mesh
from fvq_jax.training.state import TrainState
from fvq_jax.training.step import TrainStep
from fvq_jax.training.task import Task

MAX_COMPILATIONS = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step needs of each device; bytes, flops and seconds per step.

    Attributes:
      fits: whether it compiled and needs no more memory than there is.
      devices: how many.
      batch: the global batch size.
      hbm_bytes: memory that a program may use.
      bytes: by kind: parameters (of all networks, with their other variables, moving averages and frozen arrays),
        optimizer, batch, temporaries (activations, gradients, the program itself) and their total.
      flops_per_device: XLA's count and what the task adds to it; a TPU's float32 product counts as its bfloat16 passes.
      collective_bytes: bytes sent, see `compiled_cost.collective_bytes`.
      bound: compute | memory | network, what takes longest; None without published figures of the device.
      step_seconds: the time of `bound`, the least that a step can take: it hides everything else.
    """

    fits: bool
    devices: int
    batch: int
    hbm_bytes: int
    bytes: dict[str, int]
    flops_per_device: float | None = None
    collective_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    bound: str | None = None
    step_seconds: float | None = None


def plan_config(task_class: type[Task], config: ConfigDict, devices: int) -> ConfigDict:
    """A copy of the config whose step can be compiled for that many devices, without the run's data and evaluation.

    Raises:
      InputError: a run with this config could not start.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(task_class.plannable(config, devices))
    validate(config, task_class, devices)
    return config


def compile_step(task_class: type[Task], config: ConfigDict, devices: Sequence[Any]) -> tuple[Task, Plan, Any]:
    """Compiles the training step that `train` would run.

    Args:
      task_class: what is trained.
      config: from `plan_config`.
      devices: local devices, or those of a topology.

    Returns:
      The task; its plan, in which only the part on memory is filled in; and the executable, None if the compiler ran
      out of memory.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.codebook, devices)
    task = task_class(config, mesh)
    step = TrainStep.of(task, config, mesh, total_steps=2, warmup_steps=1)
    layout = NamedSharding(mesh, BATCH)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), task.batch_spec())
    state, frozen = step.abstract(), task.abstract_frozen()
    needs = _argument_bytes(state, batch, frozen)
    hbm_bytes = chips.memory_bytes(devices[0])
    lowered = step.jitted(state).lower(state, batch, frozen)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = compiled_cost.out_of_memory(str(error))
        if found is None:
            raise
        total, hbm_bytes = found
        executable = None
    else:
        total, executable = compiled_cost.total_bytes(compiled), compiled
    needs |= {"temporaries": total - sum(needs.values()), "total": total}
    fits = executable is not None and total <= hbm_bytes
    return task, Plan(fits, len(devices), config.batch_size, hbm_bytes, needs), executable


def make_plan(task_class: type[Task], config: ConfigDict, devices: Sequence[Any]) -> Plan:
    """Compiles and reads the training step; see `compile_step` for the arguments."""
    task, plan, executable = compile_step(task_class, config, devices)
    if executable is None:
        return plan
    program = compiled_cost.Program(executable.as_text())
    counted = executable.cost_analysis()
    # XLA counts the loop over micro-batches once, and so it does the loops inside the search.
    micro = config.optim.accumulate
    uncounted, passes = task.uncounted_flops(devices[0].platform)
    flops = counted.get("flops", 0.0) * micro + passes * uncounted / len(devices)
    if devices[0].platform == "tpu":
        flops += compiled_cost.repeated_pass_flops(program)
    sent = compiled_cost.collective_bytes(program, len(devices))
    bound, seconds = compiled_cost.least_time(
        devices[0].device_kind, flops, counted.get("bytes accessed", 0.0) * micro, sent
    )
    return dataclasses.replace(plan, flops_per_device=flops, collective_bytes=sent, bound=bound, step_seconds=seconds)


def largest_batch(
    needed: Callable[[int], tuple[bool, int]], unit: int, first: tuple[int, bool, int], fixed: int, limit: int
) -> int:
    """The largest batch found to fit, after at most `MAX_COMPILATIONS` compilations, including that of `first`.

    Memory grows about linearly with the batch, so each guess is the batch at which a line reaches the limit. The line
    goes through the two batches whose bytes are closest to the limit (at first, one is batch 0 with `fixed` bytes). If
    that guess is already known to fit or not to fit, the line goes through the largest batch that fits and the smallest
    that does not. The search ends when the line says that not one unit more fits.

    Args:
      needed: compiles a batch and returns whether it fits, and how many bytes it needs in total.
      unit: batches are multiples of it.
      first: (batch, fits, bytes) of a batch that is already compiled.
      fixed: bytes that are needed at any batch size.
      limit: bytes of memory that there are.

    Returns:
      The batch; 0 if none fitted.
    """
    seen = {first[0]: first[2]}
    fits, too_large = (first[0], math.inf) if first[1] else (0, first[0])

    def guess(ends):
        (below, low), (above, high) = sorted((batch, seen.get(batch, fixed)) for batch in ends)
        slope = max((high - low) / (above - below), 1.0)
        return int((below + (limit - low) / slope) // unit * unit)

    while len(seen) < MAX_COMPILATIONS and fits + unit < too_large:
        batch = guess(sorted([*seen, 0] if len(seen) == 1 else seen, key=lambda b: abs(seen.get(b, fixed) - limit))[:2])
        if not fits <= batch < too_large and too_large in seen:
            batch = guess((fits, too_large))
        if fits and batch == fits:
            break
        if not fits and len(seen) == MAX_COMPILATIONS - 1:  # the last chance to find one that fits
            batch = min(batch, too_large // 2 // unit * unit)
        batch = min(max(batch, fits + unit), too_large - unit)
        fitted, seen[batch] = needed(batch)
        fits, too_large = (batch, too_large) if fitted else (fits, batch)
    return fits


def _argument_bytes(state: TrainState, batch: Any, frozen: Any) -> dict[str, int]:
    """Bytes that the arguments of a step take on each device, by kind."""
    trained = [(network.params, network.variables) for network in state.networks.values()]
    moments = [network.opt_state for network in state.networks.values()]
    return {
        "parameters": compiled_cost.bytes_per_device((trained, state.ema, frozen)),
        "optimizer": compiled_cost.bytes_per_device((moments, state.step, state.skipped)),
        "batch": compiled_cost.bytes_per_device(batch),
    }
