"""What the hardware can do and how much of it is used: published figures, model flops utilisation, peak memory.

Placing arrays on devices is left to `fvq_jax.runtime.mesh`; timing a step to `fvq_jax.training.step_timer`.
"""

import functools
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Chip(NamedTuple):
    """Published figures of one device; None where this module has no figure.

    Attributes:
      kind: words that occur in the device kind, as JAX reports it.
      bfloat16: dense peak (no sparsity), flop/s.
      float32: the same at JAX's default precision: one bfloat16 pass on a TPU, TF32 on these GPUs.
      memory_bandwidth: bytes/s between memory and chip.
      network: bytes/s that it sends to its neighbours, all links together, one direction.
      between_slices: bytes/s, the share of one TPU in the network of its host.
      memory: bytes that the TPU compiler gives to a program, slightly less than the chip has.
    """

    kind: str
    bfloat16: float
    float32: float
    memory_bandwidth: float | None = None
    network: float | None = None
    between_slices: float | None = None
    memory: int | None = None


# The first entry whose words occur in the device kind is taken, so longer names come first. Sources: Google Cloud's
# pages on the architecture of TPU v4, v5e, v5p, v6e (half of each bidirectional bandwidth); the network between
# slices of v5p from "How to Scale Your Model" (jax-ml.github.io/scaling-book); `memory` from the compiler's own
# messages (libtpu 0.0.42); NVIDIA's data sheets of A100 (2021), H100 (2022: SXM, PCIe, NVL), H200 (2024: SXM, NVL)
# and GH200, whose flops "with sparsity" and NVLink figures for both directions are halved here.
_GIB = 1024**3
_V6E = (918e12, 918e12, 1638e9, 400e9, 12.5e9, round(31.25 * _GIB))
_V5E = (197e12, 197e12, 819e9, 200e9, 3.125e9, round(15.75 * _GIB))
_V5P = (459e12, 459e12, 2765e9, 600e9, 6.25e9, round(95.74 * _GIB))
CHIPS = (
    Chip("TPU v6 lite", *_V6E),
    Chip("TPU v6e", *_V6E),
    Chip("TPU v5 lite", *_V5E),
    Chip("TPU v5e", *_V5E),
    Chip("TPU v5p", *_V5P),
    Chip("TPU v5", *_V5P),
    Chip("TPU v4", 275e12, 275e12),
    Chip("H200 NVL", 835.5e12, 417.5e12, 4.8e12, 450e9),
    Chip("H200", 989.5e12, 494.5e12, 4.8e12, 450e9),
    Chip("GH200", 989.5e12, 494.5e12),
    Chip("H100 NVL", 835.5e12, 417.5e12, 3.9e12, 300e9),
    Chip("H100 PCIe", 756.5e12, 378e12, 2e12, 300e9),
    Chip("H100", 989.5e12, 494.5e12, 3.35e12, 450e9),
    Chip("A100", 312e12, 156e12),
)


def published_chip(device_kind: str) -> Chip | None:
    """The published figures of this kind of device; None if this module has none."""
    return next((chip for chip in CHIPS if re.search(rf"\b{chip.kind}\b(?! lite)", device_kind)), None)


def peak_flops(device: jax.Device, dtype: DTypeLike = jnp.bfloat16) -> float:
    """Peak flop/s of one device for matrix products of `dtype`: bfloat16, float16, or float32 as JAX runs it.

    Published dense figures for TPU v4, v5e, v5p, v6e, A100, H100 and H200. For any other device, CPUs
    included, there is no figure to trust: the fastest of a few timed float32 matrix products stands in,
    measured once per process and kind. ValueError for other dtypes.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)):
        raise ValueError(f"peak_flops knows bfloat16, float16 and float32, not {jnp.dtype(dtype).name}")
    published = _published_flops(device.device_kind, jnp.dtype(dtype))
    return _measured_flops(device.platform, device.device_kind) if published is None else published


def _published_flops(device_kind: str, dtype: jnp.dtype) -> float | None:
    chip = published_chip(device_kind)
    return chip and (chip.float32 if dtype == jnp.float32 else chip.bfloat16)


@functools.cache
def _measured_flops(platform: str, device_kind: str, repeats: int = 5) -> float:
    """Flop/s of the fastest of `repeats` square float32 matrix products on a local device of this kind."""
    device = next(d for d in jax.local_devices(backend=platform) if d.device_kind == device_kind)
    size = 1024 if platform == "cpu" else 8192
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def model_flops_utilisation(
    flops_per_step: float | int,
    seconds_per_step: float,
    devices: Sequence[jax.Device],
    dtype: DTypeLike = jnp.bfloat16,
) -> float:
    """Fraction of the devices' joint peak that the model's arithmetic reaches; 0 where nothing was timed.

    `flops_per_step` counts the whole step over *all* devices (XLA's cost analysis is per device: multiply).
    Devices are taken to be alike. The devices of a process that are CPUs are one CPU together, and count as one.
    """
    if seconds_per_step <= 0.0:
        return 0.0
    of_cpu = devices[0].platform == "cpu"
    count = len({device.process_index for device in devices}) if of_cpu else len(devices)
    return flops_per_step / (seconds_per_step * peak_flops(devices[0], dtype) * count)


def memory_bytes(device: jax.Device) -> int:
    """Bytes of memory that a program may use on this device: a published figure, or what the device reports.

    For a CPU device: an equal share of the machine's memory, since all simulated devices use the same memory.
    """
    chip = published_chip(device.device_kind)
    if chip is not None and chip.memory is not None:
        return chip.memory
    if reported := (device.memory_stats() or {}).get("bytes_limit"):
        return reported
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def peak_device_memory_bytes() -> int:
    """Peak memory use so far of any local device, in bytes; where devices do not count it (CPU), of this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return max(peaks) or _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
