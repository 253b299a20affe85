"""TPU slices that are not here, to compile for. Needs libtpu, which `make test` installs on x86-64 Linux."""

import functools
import os
from importlib.util import find_spec

import pytest
from jax.experimental import topologies

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")


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
