"""Command line: `python -m fvq_jax.plan --config=configs/fvq262k.py:batch=1024 --topology=v5e:16x16`.

Compiles the training step of a run ahead of time, for a TPU slice without a TPU or for the local devices, and says
what it needs and how fast it can be: bytes per device, flops, bytes sent, and the least time of a step. No data, no
weights and no workdir are needed; flags are those of `fvq_jax.main`, so a run's own command line can be planned.
With `--json` standard output is one JSON object. Exit codes: 0 (also when the run does not fit), 2 bad input.
"""

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental import topologies
from ml_collections import ConfigDict

from fvq_jax.runtime import chips, exits
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import json_text
from fvq_jax.runtime.flags import CONFIG, parse_flags
from fvq_jax.runtime.libtpu import NO_TPU
from fvq_jax.runtime.mesh import mesh_shape
from fvq_jax.tasks import task_of
from fvq_jax.training.run import divide_cpu_for
from fvq_jax.training.step_plan import Plan, compile_step, largest_batch, make_plan, plan_config
from fvq_jax.training.task import Task

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice such as v5e:4x4, v5p:2x4x4, v6e:16x16; local devices if unset"
)
SLICES = flags.DEFINE_integer("slices", 1, "How many such slices", lower_bound=1)
MESH = flags.DEFINE_list("mesh", None, "DATA,CODEBOOK: short for --config.mesh.data and --config.mesh.codebook")
JSON = flags.DEFINE_bool("json", False, "One JSON object instead of a table")
FIT_BATCH = flags.DEFINE_bool(
    "fit-batch", False, "Also look for the largest batch that fits, with 5 compilations at most"
)
flags.declare_key_flag(CONFIG)  # else --help would leave it out

# What libtpu wants to know to compile for a slice, which is named by --topology.
LIBTPU_ENVIRONMENT = {
    **NO_TPU,
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Devices of TPU slices to compile for; the slices need not be here. JAX sees only CPUs on this host afterwards.

    Call it before JAX looks for devices.

    Raises:
      InputError: libtpu is not installed, or there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology compiles with libtpu, which is not installed: pip install -e .[tpu]")
    os.environ.update(LIBTPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    try:
        devices: list[Any] = topologies.get_topology_desc(name, "tpu", num_slices=slices).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology={name} is no TPU slice such as v5e:4x4 or v5p:2x4x4: {reason}") from None
    chip = chips.published_chip(devices[0].device_kind)
    if chip is None or chip.memory is None:
        raise InputError(f"--topology={name}: no figures of {devices[0].device_kind} here: use v5e, v5p or v6e")
    return devices


def main(argv: list[str]) -> int:
    """Plans the run; returns the exit code."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options start with --")
    if CONFIG.value is None:
        raise InputError("--config=FILE is needed, see --help")
    logging.set_verbosity(logging.INFO)
    given = _with_mesh(CONFIG.value, MESH.value)
    if TOPOLOGY.value is None:
        divide_cpu_for(given)
    devices = _devices(TOPOLOGY.value, SLICES.value)
    task_class = task_of(CONFIG.value)
    config = plan_config(task_class, given, len(devices))
    plan = _logged(make_plan, task_class, config, devices)
    result = dataclasses.asdict(plan)
    if FIT_BATCH.value:
        result["largest_batch"] = _fit_batch(task_class, config, devices, plan)
    text = json_text(result) if JSON.value else _table(result, task_class.unit, config, devices)
    sys.stdout.write(text + "\n")
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


def _logged(make: Callable[..., Plan], task_class: type[Task], config: ConfigDict, devices: Sequence[Any]) -> Plan:
    """Makes a plan, and logs what it compiles and whether that fits."""
    logging.info("compiling batch %d for %d x %s", config.batch_size, len(devices), devices[0].device_kind)
    began = time.monotonic()
    plan = make(task_class, config, devices)
    verdict = "fits" if plan.fits else "does not fit"
    used, seconds = plan.bytes["total"] / 1024**3, time.monotonic() - began
    logging.info("batch %d %s: %.2f of %.2f GiB; %.0f s", plan.batch, verdict, used, plan.hbm_bytes / 1024**3, seconds)
    return plan


def _fit_batch(task_class: type[Task], config: ConfigDict, devices: Sequence[Any], plan: Plan) -> int:
    """The largest batch that fits; the search starts from `plan`, which is for the config's batch."""

    def needed(batch):
        changed = config.copy_and_resolve_references()
        changed.batch_size = batch
        found = _logged(lambda *args: compile_step(*args)[1], task_class, changed, devices)
        return found.fits, found.bytes["total"]

    fixed = plan.bytes["parameters"] + plan.bytes["optimizer"]
    first = (plan.batch, plan.fits, plan.bytes["total"])
    return largest_batch(needed, len(devices) * config.optim.accumulate, first, fixed, plan.hbm_bytes)


def _table(plan: dict[str, Any], unit: str, config: ConfigDict, devices: Sequence[Any]) -> str:
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
            estimate = f"{plan['step_seconds']:.4g} s ({rate:,.0f} {unit}/s), {plan['bound']}-bound"
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
    app.run(lambda argv: exits.run(lambda: main(argv), kept="no plan was made"), flags_parser=parse_flags)
