"""What a benchmark ran on: one JSON object with the chip, its memory and peak, and the versions of what is installed.

python benchmarks/chip.py
"""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.processes import GIB, machine

PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton", "transformers")
COLUMNS = {
    "device": "chip",
    "platform": "platform",
    "memory_gib": "GiB",
    "peak_tflops": "bfloat16 Tflop/s, published or measured",
    "machine": "host",
    "python": "Python",
    **{package: package for package in PACKAGES},
}


def describe() -> dict[str, object]:
    """The row; a package that is not installed has no entry."""
    import jax

    from fvq_jax.runtime import chips

    device = jax.devices()[0]
    row = {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count(), **machine()}
    row |= {"memory_gib": round(chips.memory_bytes(device) / GIB, 1), "python": platform.python_version()}
    row["peak_tflops"] = round(chips.peak_flops(device) / 1e12, 2)
    row["runtime"] = " ".join(getattr(device.client, "platform_version", "").split())
    for package in PACKAGES:
        try:
            row[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return row


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe()) + "\n")
