"""Chips that are not here, to compile for.

TPU slices need libtpu, which `make test` installs on x86-64 Linux; a GPU needs JAX's CUDA plugin (`.[cuda]`).
"""

import functools
import os
from importlib.util import find_spec

import pytest
from jax.experimental import topologies

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="the CUDA plugin is not installed")

# What the compiler asks of an NVIDIA H100 SXM, from its data sheet and CUDA's table of compute capability 9.0.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def tpu_devices(topology):
    """Device descriptions of a slice such as v5e:2x2."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several test processes
    }
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@functools.cache
def gpu_devices():
    """Descriptions of one H100."""
    options = {"target_config": H100, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="h100", **options).devices


# For `parametrize`: functions that return devices of every kind that programs can be compiled for here.
ACCELERATORS = [
    pytest.param(lambda: tpu_devices("v5e:2x2"), marks=needs_libtpu, id="tpu"),
    pytest.param(gpu_devices, marks=needs_cuda, id="gpu"),
]
