import pathlib
import subprocess
import sys

import pytest

from fvq_jax.runtime import allocation

ROOT = pathlib.Path(__file__).parents[2]
# The fewest page faults of a call of a program with large temporary arrays; the first calls find no memory to reuse.
PROGRAM = """
import resource, sys
from fvq_jax.runtime.allocation import keep_memory
kept = sys.argv[1] == "kept" and keep_memory()
import jax, jax.numpy as jnp
run = jax.jit(lambda x: jnp.sort(x) + jnp.sort(-x)[::-1])
x = jnp.arange(4_000_000.0)
found = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(found))
"""


def faults(how):
    command = [sys.executable, "-c", PROGRAM, how]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    kept, count = output.split()
    return kept == "True", int(count)


@pytest.mark.slow
def test_a_step_takes_its_memory_from_the_step_before():
    kept, few = faults("kept")
    if not kept:
        pytest.skip("an accelerator, or another C library than glibc")
    _, many = faults("default")
    assert many > 1000
    assert few < many / 10


def test_with_an_accelerator_nothing_is_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(allocation, "_ACCELERATORS", (str(tmp_path),))
    monkeypatch.setattr(allocation.ctypes, "CDLL", None)  # not even looked at
    assert not allocation.keep_memory()
