import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from fvq_jax.runtime.cpu_devices import compiler_options
from fvq_jax.runtime.mesh import BATCH, make_mesh
from fvq_jax.tasks import task_of
from fvq_jax.training.step import TrainStep
from tests.helpers.tiny import tiny_config

# How many devices a CPU counts as can be set until JAX is used for the first time: so in a process of its own.
CHOOSE = """
import json, os, sys
import jax
from fvq_jax.runtime.cpu_devices import divide_cpu

cores, cases = json.loads(sys.argv[1])
os.sched_getaffinity = lambda process: set(range(cores))
for wanted, mesh, batches in cases:
    jax.config.update("jax_num_cpu_devices", -1)
    divide_cpu(wanted, mesh, batches)
    print(jax.config.jax_num_cpu_devices)
print(jax.local_device_count())
"""


def chosen(cores, *cases, **changes):
    """What is set for every case, and how many devices there are with the last one."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | changes
    command = [sys.executable, "-c", CHOOSE, json.dumps([cores, cases])]
    result = subprocess.run(command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


def test_a_device_for_each_core_that_divides_the_batches():
    left = (-1, 1)
    cases = [
        (1, left, [32]),
        (5, left, [32]),  # refused later, with the batch that would work
        (0, left, [30]),
        (0, left, [32]),
        (0, left, [30, 128]),
        (0, left, [7]),
        (0, (1, 1), [32]),
        (0, (-1, 3), [36]),
        (0, (-1, 5), [36]),
        (0, (3, -1), [36]),
        (0, (2, 2), [36]),
        (0, left, [0]),
        (0, left, [36]),
    ]
    assert chosen(6, *cases) == [-1, 5, 6, 4, 2, -1, -1, 6, -1, 6, 4, 6, 6, 6]


def test_at_most_eight_devices():
    assert chosen(64, (0, (-1, 1), [64]), (16, (-1, 1), [64])) == [8, 16, 16]


def test_a_number_that_the_environment_gives_stays():
    flags = "--xla_force_host_platform_device_count=3"
    assert chosen(4, (0, (-1, 1), [32]), XLA_FLAGS=flags) == [-1, 3]
    code = CHOOSE.replace('jax.config.update("jax_num_cpu_devices", -1)', "")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", code, json.dumps([4, [(0, (-1, 1), [32])]])]
    assert subprocess.check_output(command, env=environment, text=True).split() == ["1", "1"]


ONE_THREAD = {"xla_cpu_multi_thread_eigen", "xla_cpu_enable_concurrency_optimized_scheduler"}
BY_EIGEN = {"xla_cpu_experimental_ynn_fusion_type"}


@pytest.mark.parametrize(
    ("devices", "cores", "expected"),
    [(1, 1, set()), (4, 4, ONE_THREAD), (4, 2, ONE_THREAD), (1, 2, set()), (4, 8, set())],
)
def test_a_device_is_one_thread_where_no_core_would_be_idle(devices, cores, expected, monkeypatch):
    monkeypatch.setattr("fvq_jax.runtime.cpu_devices.cores", lambda: cores)
    options = compiler_options(make_mesh(-1, 1, jax.devices()[:devices]))
    assert set(options) == expected | BY_EIGEN
    inputs = jax.ShapeDtypeStruct((8, 3), "float32")
    assert jax.jit(jax.numpy.sin, compiler_options=options).lower(inputs).compile()  # all names are known


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    platform: str


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_other_platforms_have_no_options(platform):
    """Nor are they asked which of their devices are in this process: of a pod that is only planned for, none is."""
    devices = np.array([Device(i, platform) for i in range(8)])
    assert compiler_options(Mesh(devices, ("data",))) == {}


UNKNOWN = """
import os, jax
from fvq_jax.runtime import cpu_devices
from fvq_jax.runtime.mesh import make_mesh

def jit(function, compiler_options):
    return original(function, compiler_options={"no_such_option": True})

original, jax.jit = jax.jit, jit
cpu_devices.cores = lambda: 4
print(cpu_devices.compiler_options(make_mesh(1, 1)))
"""


def test_an_option_that_this_version_does_not_know_is_left_out():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", UNKNOWN]
    assert subprocess.check_output(command, env=environment | {"JAX_PLATFORMS": "cpu"}, text=True).strip() == "{}"


def test_the_step_is_compiled_with_these_options(monkeypatch):
    monkeypatch.setattr("fvq_jax.training.step.compiler_options", lambda mesh: {"no_such_option": mesh.size})
    config = tiny_config()
    mesh = make_mesh(-1, 1)
    task = task_of(config)(config, mesh)
    step = TrainStep.of(task, config, mesh, total_steps=4, warmup_steps=1)
    state = step.abstract()
    images = jax.ShapeDtypeStruct((16, 16, 16, 3), "uint8", sharding=NamedSharding(mesh, BATCH))
    lowered = step.jitted(state).lower(state, {"image": images}, task.frozen)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        lowered.compile()
