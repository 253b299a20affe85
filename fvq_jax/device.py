"""What the hardware can do and how much of it is used: peak flops, model flops utilisation, peak memory.

Placing arrays on devices is left to `fvq_jax.sharding`; timing a step to `fvq_jax.metrics.StepTimer`.
"""

import functools
import re
import resource
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Dense (no sparsity) peaks per device in flop/s: (bfloat16, float32 at JAX's default precision). That default
# runs a float32 product in one bfloat16 pass on a TPU (so both figures agree) and in TF32 on these GPUs. The
# first entry whose words stand in the device kind counts, so longer names come first. Sources: Google Cloud's
# pages on the architecture of TPU v4, v5e, v5p, v6e; NVIDIA's data sheets of A100 (2021), H100 (2022: SXM,
# PCIe, NVL), H200 (2024: SXM, NVL) and GH200, whose figures "with sparsity" are halved here.
_PEAK_FLOPS = (
    ("TPU v6 lite", 918e12, 918e12),
    ("TPU v6e", 918e12, 918e12),
    ("TPU v5 lite", 197e12, 197e12),
    ("TPU v5e", 197e12, 197e12),
    ("TPU v5p", 459e12, 459e12),
    ("TPU v5", 459e12, 459e12),
    ("TPU v4", 275e12, 275e12),
    ("H200 NVL", 835.5e12, 417.5e12),
    ("H200", 989.5e12, 494.5e12),
    ("GH200", 989.5e12, 494.5e12),
    ("H100 NVL", 835.5e12, 417.5e12),
    ("H100 PCIe", 756.5e12, 378e12),
    ("H100", 989.5e12, 494.5e12),
    ("A100", 312e12, 156e12),
)


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
    for name, half, single in _PEAK_FLOPS:
        if re.search(rf"\b{name}\b(?! lite)", device_kind):
            return single if dtype == jnp.float32 else half
    return None


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
    Devices are taken to be alike. Simulated CPU devices each count as a whole CPU, so there the figure is too
    low by their number.
    """
    if seconds_per_step <= 0.0:
        return 0.0
    return flops_per_step / (seconds_per_step * peak_flops(devices[0], dtype) * len(devices))


def peak_device_memory_bytes() -> int:
    """Highest memory use so far of any local device, in bytes; of this process where none keeps count (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return max(peaks) or _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
