"""Command line: `python -m fvq_jax.plan --config=configs/fvq262k.py:batch=1024 --topology=v5e:16x16`.

Compiles the training step of a run ahead of time, for a TPU slice without a TPU or for the local devices, and says
what it needs and how fast it can be: bytes per device, flops, bytes sent, and the least time of a step. No data, no
weights and no workdir are needed; flags are those of `fvq_jax.main`, so a run's own command line can be planned.
With `--json` standard output is one JSON object. Exit codes: 0 (also when the run does not fit), 2 bad input.

How a compiled program is read is left to `fvq_jax.cost`, what a chip can do to `fvq_jax.device`.
"""

import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from fvq_jax import cost, device
from fvq_jax.command import BAD_INPUT, fail
from fvq_jax.config import validate
from fvq_jax.errors import InputError
from fvq_jax.main import CONFIG, parse_flags
from fvq_jax.ops.nearest import PASSES
from fvq_jax.sharding import BATCH, make_mesh, mesh_shape
from fvq_jax.state import TrainState, abstract_state
from fvq_jax.tasks.tokenizer import TokenizerTask, abstract_frozen

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice such as v5e:4x4, v5p:2x4x4, v6e:16x16; local devices if unset"
)
SLICES = flags.DEFINE_integer("slices", 1, "How many such slices", lower_bound=1)
MESH = flags.DEFINE_list("mesh", None, "DATA,CODEBOOK: short for --config.mesh.data and --config.mesh.codebook")
JSON = flags.DEFINE_bool("json", False, "One JSON object instead of a table")
FIT_BATCH = flags.DEFINE_bool(
    "fit-batch", False, "Also look for the largest batch that fits, with 5 compilations at most"
)

MAX_COMPILATIONS = 5
# What libtpu wants to know on a machine without a TPU; the slice itself is named by --topology.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step needs of each device; bytes, flops and seconds per step.

    Attributes:
      fits: whether it compiled and needs no more memory than there is.
      devices, batch: how many, and the global batch.
      hbm_bytes: memory that a program may use.
      bytes: parameters (of all networks, with moving averages and the frozen LPIPS), optimizer, batch, temporaries
        (activations, gradients, the program itself) and their total.
      flops_per_device: XLA's count and the search's own, where a TPU's float32 product counts as its bfloat16 passes.
      collective_bytes: bytes sent, see `cost.collective_bytes`.
      bound: compute | memory | network, what takes longest; None without published figures of the device.
      step_seconds: that time: the least a step can take, everything else hidden behind it.
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


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Devices of TPU slices that need not be here, to compile for; the host's own devices become CPUs.

    To be called before JAX looks for devices.

    Raises:
      InputError: libtpu is not installed, or there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology compiles with libtpu, which is not installed: pip install -e .[tpu]")
    os.environ.update(LIBTPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    try:
        devices = topologies.get_topology_desc(name, "tpu", num_slices=slices).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology={name} is no TPU slice such as v5e:4x4 or v5p:2x4x4: {reason}") from None
    chip = device.published_chip(devices[0].device_kind)
    if chip is None or chip.memory is None:
        raise InputError(f"--topology={name}: no figures of {devices[0].device_kind} here: use v5e, v5p or v6e")
    return devices


def plan_config(config: ConfigDict, devices: int) -> ConfigDict:
    """A copy that can be planned on that many devices: evaluation and folders of pictures play no part.

    Raises:
      InputError: the run could not start.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"data.source": "photos", "eval.batch_size": devices})
    validate(config, devices)
    return config


def compile_step(config: ConfigDict, devices: Sequence[Any]) -> tuple[TokenizerTask, Plan, Any]:
    """Compiles the training step that `train` would run.

    Args:
      config: from `plan_config`.
      devices: local ones, or of a topology.

    Returns:
      The task; its plan so far, with all that memory needs; and the executable, None if memory does not suffice.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.codebook, devices)
    frozen = abstract_frozen(config, mesh)
    task = TokenizerTask(config, mesh, total_steps=2, warmup_steps=1, frozen=frozen)
    state, batch = abstract_state(task.init, mesh), _abstract_batch(config, mesh)
    needs = _argument_bytes(state, batch, frozen)
    hbm_bytes = device.memory_bytes(devices[0])
    lowered = task.jitted_step(state).lower(state, batch, frozen)
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = cost.out_of_memory(str(error))
        if found is None:
            raise
        total, hbm_bytes = found
        executable = None
    else:
        total = cost.total_bytes(executable)
    needs |= {"temporaries": total - sum(needs.values()), "total": total}
    fits = executable is not None and total <= hbm_bytes
    return task, Plan(fits, len(devices), config.batch_size, hbm_bytes, needs), executable


def make_plan(config: ConfigDict, devices: Sequence[Any]) -> Plan:
    """Compiles and reads the training step; see `compile_step` for the arguments."""
    task, plan, executable = compile_step(config, devices)
    if executable is None:
        return plan
    program = cost.Program(executable.as_text())
    counted = executable.cost_analysis()
    # The loop over micro-batches is counted once, and so are the loops inside the search.
    micro = config.optim.accumulate
    search = task.uncounted_flops(config.batch_size) / len(devices)
    passes = 1 if devices[0].platform == "cpu" else PASSES[config.tokenizer.search_precision]
    flops = counted.get("flops", 0.0) * micro + passes * search
    if devices[0].platform == "tpu":
        flops += cost.repeated_pass_flops(program)
    sent = cost.collective_bytes(program, len(devices))
    bound, seconds = cost.least_time(devices[0].device_kind, flops, counted.get("bytes accessed", 0.0) * micro, sent)
    return dataclasses.replace(plan, flops_per_device=flops, collective_bytes=sent, bound=bound, step_seconds=seconds)


def largest_batch(
    needed: Callable[[int], tuple[bool, int]], unit: int, first: tuple[int, bool, int], fixed: int, limit: int
) -> int:
    """The largest batch seen to fit, with at most `MAX_COMPILATIONS` compilations, the first of them included.

    Memory grows about linearly with the batch, so each guess lies on the line through the two batches that need
    closest to the limit (at first, through `fixed` bytes at batch 0), or, should that miss, through the largest that
    fits and the smallest that does not. Where the line says that not even one unit more fits, the search ends.

    Args:
      needed: compiles a batch; whether it fits, and the bytes it needs in total.
      unit: batches are multiples of it.
      first: (batch, fits, bytes) of a batch compiled already.
      fixed: bytes that no batch avoids.
      limit: bytes there are.

    Returns:
      0 if no batch fitted.
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


def main(argv: list[str]) -> int:
    """Plans the run; returns the exit code."""
    if len(argv) > 1:
        return fail(f"unexpected argument {argv[1]!r}: options start with --", BAD_INPUT)
    if CONFIG.value is None:
        return fail("--config=FILE is needed, see --help", BAD_INPUT)
    logging.set_verbosity(logging.INFO)
    try:
        devices = _devices(TOPOLOGY.value, SLICES.value)
        config = plan_config(_with_mesh(CONFIG.value, MESH.value), len(devices))
        plan = _logged(make_plan, config, devices)
        result = dataclasses.asdict(plan)
        if FIT_BATCH.value:
            result["largest_batch"] = _fit_batch(config, devices, plan)
    except InputError as error:
        return fail(str(error), BAD_INPUT)
    sys.stdout.write((json.dumps(result) if JSON.value else _table(result, config, devices)) + "\n")
    return 0


def _devices(topology: str | None, slices: int) -> Sequence[Any]:
    if topology is not None:
        return topology_devices(topology, slices)
    if slices > 1:
        raise InputError(f"--slices={slices} needs --topology, which says what one slice is")
    return jax.local_devices()


def _with_mesh(config: ConfigDict, mesh: list[str] | None) -> ConfigDict:
    if mesh is None:
        return config
    try:
        data, codebook = (int(size) for size in mesh)
    except ValueError:
        raise InputError(f"--mesh={','.join(mesh)} must be two whole numbers, for instance --mesh=64,4") from None
    config.update_from_flattened_dict({"mesh.data": data, "mesh.codebook": codebook})
    return config


def _abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layout of what `data.pipeline.train_batches` yields."""
    layout, size = NamedSharding(mesh, BATCH), config.data.image_size
    return {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8, sharding=layout),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=layout),
    }


def _argument_bytes(state: TrainState, batch: Any, frozen: Any) -> dict[str, int]:
    """Bytes that each device holds of what a step is called with, by kind."""
    trained = [(network.params, network.batch_stats) for network in state.networks.values()]
    moments = [network.opt_state for network in state.networks.values()]
    return {
        "parameters": cost.bytes_per_device((trained, state.ema, frozen)),
        "optimizer": cost.bytes_per_device((moments, state.step, state.skipped)),
        "batch": cost.bytes_per_device(batch),
    }


def _logged(make: Callable, config: ConfigDict, devices: Sequence[Any]) -> Plan:
    """Makes a plan, and says so."""
    logging.info("compiling batch %d for %d x %s", config.batch_size, len(devices), devices[0].device_kind)
    began = time.monotonic()
    plan = make(config, devices)
    verdict = "fits" if plan.fits else "does not fit"
    used, seconds = plan.bytes["total"] / 1024**3, time.monotonic() - began
    logging.info("batch %d %s: %.2f of %.2f GiB; %.0f s", plan.batch, verdict, used, plan.hbm_bytes / 1024**3, seconds)
    return plan


def _fit_batch(config: ConfigDict, devices: Sequence[Any], plan: Plan) -> int:
    """The largest batch that fits, looked for from the plan of another."""

    def needed(batch):
        changed = config.copy_and_resolve_references()
        changed.batch_size = batch
        found = _logged(lambda *args: compile_step(*args)[1], changed, devices)
        return found.fits, found.bytes["total"]

    fixed = plan.bytes["parameters"] + plan.bytes["optimizer"]
    first = (plan.batch, plan.fits, plan.bytes["total"])
    return largest_batch(needed, len(devices) * config.optim.accumulate, first, fixed, plan.hbm_bytes)


def _table(plan: dict[str, Any], config: ConfigDict, devices: Sequence[Any]) -> str:
    """The plan for people."""
    sizes = plan["bytes"]
    data, codebook = mesh_shape(config.mesh.data, config.mesh.codebook, plan["devices"])
    lines = [
        ("devices", f"{plan['devices']} x {devices[0].device_kind}"),
        ("mesh", f"{data} x {codebook} (data x codebook)"),
        ("global batch", f"{plan['batch']}"),
        ("fits", "yes" if plan["fits"] else "no"),
        ("memory per device", f"{_size(sizes['total'])} of {_size(plan['hbm_bytes'])}"),
        *((f"  {name}", _size(size)) for name, size in sizes.items() if name != "total"),
    ]
    if plan["flops_per_device"] is not None:
        lines.append(("flops per device, step", f"{plan['flops_per_device']:.3g}"))
        lines.append(("sent per device, step", _size(sum(plan["collective_bytes"].values()))))
        lines += [(f"  {kind}", _size(size)) for kind, size in plan["collective_bytes"].items()]
        if plan["step_seconds"] is None:
            lines.append(("time of a step", f"no estimate: no published figures of {devices[0].device_kind}"))
        else:
            rate = config.batch_size / plan["step_seconds"]
            estimate = f"{plan['step_seconds']:.4g} s ({rate:,.0f} images/s), {plan['bound']}-bound"
            lines.append(("time of a step, at least", f"{estimate}; estimated from published figures, not measured"))
    if "largest_batch" in plan:
        lines.append(("largest batch seen to fit", f"{plan['largest_batch'] or 'none'}"))
    return "\n".join(f"{name:26}{value}" for name, value in lines)


def _size(size: int) -> str:
    for unit, bytes_of_it in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.2f} {unit}"
    return f"{size} bytes"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
