"""The cores of a CPU as devices, over which a batch is divided.

JAX takes a CPU for one device and divides single operations among its cores, where they are large. With a device per
core, each computes its rows of the batch by itself, so that small operations are divided too. What is the same for all
rows, such as the bridge, is computed on every device, so this does not pay with a large codebook.
"""

import functools
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import mesh_shape

MOST = 8  # every device keeps parameters and moments

CompilerOptions = dict[str, bool | str]


def divide_cpu(wanted: int, mesh: tuple[int, int], batches: Sequence[int]) -> None:
    """Makes this process's CPU count as several devices. To be called before the first use of a device.

    It has no effect on a TPU or GPU, nor where the number is given: by JAX_NUM_CPU_DEVICES or in XLA_FLAGS.

    Args:
      wanted: how many; 0: one for each core that this process may use, at most MOST, as far as they fit the mesh and
        divide all batches.
      mesh: the sizes of its axes; -1: all devices that are left.
      batches: sizes of the batches that are divided over the devices.
    """
    given = jax.config.values["jax_num_cpu_devices"] >= 0
    if given or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if wanted == 0:
        batch = math.gcd(*batches)
        counts = [n for n in range(1, min(cores(), MOST) + 1) if batch % n == 0 and _fits(n, mesh)]
        wanted = max(counts, default=1)
    if wanted > 1:
        jax.config.update("jax_num_cpu_devices", wanted)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fits(devices: int, mesh: tuple[int, int]) -> bool:
    try:
        return bool(mesh_shape(*mesh, devices))
    except InputError:
        return False


def compiler_options(mesh: Mesh) -> CompilerOptions:
    """Options for programs on this mesh; none on other platforms.

    On a CPU convolutions are Eigen's and not YNNPACK's, which XLA takes otherwise: several threads gain more from them,
    above all in the gradients of kernels (docs/results.md, "Training step"). Where every core of a CPU is a device, one
    thread computes what one device does; with fewer devices, cores would be idle.
    """
    if mesh.devices.flat[0].platform != "cpu":  # before local_mesh, which devices that are not here may not have
        return {}
    options = dict(_convolutions_by_eigen())
    if mesh.local_mesh.size >= max(2, cores()):
        options |= {"xla_cpu_multi_thread_eigen": False, "xla_cpu_enable_concurrency_optimized_scheduler": False}
    return options


@functools.cache
def _convolutions_by_eigen() -> CompilerOptions:
    """YNNPACK for products and reductions alone. Empty if this version of XLA does not know the option."""
    options: CompilerOptions = {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    }
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # an experimental option may go
        return {}
    return options
