import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from fvq_jax import plan
from fvq_jax.runtime.errors import InputError
from fvq_jax.training.step_plan import Plan
from tests.helpers.chips import needs_libtpu
from tests.helpers.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
KEYS = [
    "fits",
    "devices",
    "batch",
    "hbm_bytes",
    "bytes",
    "flops_per_device",
    "collective_bytes",
    "bound",
    "step_seconds",
]
TINY = (
    "--config=configs/fvq16k.py:smoke",
    "--config.tokenizer.ch_mult=(1,)",
    "--config.tokenizer.num_res_blocks=1",
    "--config.tokenizer.quantizer.codebook_size=64",
    "--config.tokenizer.quantizer.bridge=XS/2-d1",
    "--config.adversarial.weight=0.0",
    "--config.data.image_size=16",
)


def run(*args):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_a_plan_that_does_not_fit_for_people():
    sizes = {"parameters": 2 * 1024**3, "optimizer": 1024**2, "batch": 2048, "temporaries": 7, "total": 20_444_044_329}
    result = dataclasses.asdict(Plan(False, 8, 16, round(15.75 * 1024**3), sizes))
    table = plan._table(result, "images", tiny_config(), jax.devices())
    assert re.search(r"^devices +8 x cpu$", table, re.MULTILINE)
    assert re.search(r"^mesh +8 x 1 ", table, re.MULTILINE)
    assert re.search(r"^fits +no$", table, re.MULTILINE)
    assert re.search(r"^memory per device +19.04 GiB of 15.75 GiB$", table, re.MULTILINE)
    for name, size in {"parameters": "2.00 GiB", "optimizer": "1.00 MiB", "temporaries": "7 bytes"}.items():
        assert re.search(rf"^  {name} +{size}$", table, re.MULTILINE)
    assert "flops" not in table
    assert "total" not in table


def test_a_plan_that_fits_for_people():
    sizes = {"parameters": 3, "optimizer": 2, "batch": 1, "temporaries": 0, "total": 6}
    result = Plan(True, 8, 16, 100, sizes, 2.5e12, {"all-gather": 2048, "all-reduce": 1024}, "memory", 0.5)
    table = plan._table(dataclasses.asdict(result) | {"largest_batch": 64}, "images", tiny_config(), jax.devices())
    assert re.search(r"^flops per device, step +2.5e\+12$", table, re.MULTILINE)
    assert re.search(r"^sent per device, step +3.00 KiB$", table, re.MULTILINE)
    assert re.search(r"^time of a step, at least +0.5 s \(32 images/s\), memory-bound; estimated", table, re.MULTILINE)
    assert re.search(r"^largest batch seen to fit +64$", table, re.MULTILINE)


def test_the_short_form_of_a_mesh():
    for given, expected in ((["2", "4"], (2, 4)), (None, (-1, 1))):
        mesh = plan._with_mesh(tiny_config(), given).mesh
        assert (mesh.data, mesh.codebook) == expected
    for mesh in (["2"], ["2", "x"], ["1", "2", "4"]):
        with pytest.raises(InputError, match=f"--mesh={','.join(mesh)} must be two whole numbers"):
            plan._with_mesh(tiny_config(), mesh)


def test_without_libtpu_a_topology_is_refused(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu, which is not installed: pip install -e .\[tpu\]"):
        plan.topology_devices("v5e:2x2")


@needs_libtpu
def test_slices_that_are_not_here():
    script = """
from fvq_jax.runtime.errors import InputError
from fvq_jax.plan import topology_devices
devices = topology_devices("v5e:4x4", 2)
print(len(devices), sorted({device.slice_index for device in devices}), devices[0].device_kind)
print(len(topology_devices("v5p:2x4x4")), len(topology_devices("v6e:2x2")))
for name in ("v9:2x2", "v5e:3x5", "v5e", "v4:2x2x1"):
    try:
        topology_devices(name)
    except InputError as error:
        print(error)
"""
    result = run("-c", script)
    lines = result.stdout.splitlines()
    assert lines[:2] == ["32 [0, 1] TPU v5 lite", "32 4"], result.stderr
    for name, line in zip(("v9:2x2", "v5e:3x5", "v5e", "v4:2x2x1"), lines[2:], strict=True):
        assert line.startswith(f"--topology={name}")


def check_command(*args, batch=8):
    """Runs the program on the tiny config, and checks its one JSON object."""
    result = run("-m", "fvq_jax.plan", *TINY, "--json", *args)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    assert result.stdout.count("\n") == 1
    assert found["fits"]
    assert found["batch"] == batch
    assert found["hbm_bytes"] > found["bytes"]["total"] > 0
    assert sum(found["bytes"].values()) == 2 * found["bytes"]["total"]
    return found


@needs_libtpu
def test_a_plan_for_tpus_of_several_hosts_that_are_not_here():
    found = check_command("--topology=v5e:4x4", "--mesh=8,2", "--config.batch_size=32", batch=32)
    assert found["devices"] == 16
    assert found["hbm_bytes"] == round(15.75 * 1024**3)
    # The latents of a codebook group: 2 images of 16 x 16 tokens each, 16 dimensions; and their gradient.
    assert found["collective_bytes"]["all-gather"] >= 2 * 2 * 256 * 16 * 4
    assert found["collective_bytes"]["all-reduce"] > 0
    assert found["bound"] in ("compute", "memory", "network")
    assert 0 < found["step_seconds"] < 1


@pytest.mark.slow
def test_a_plan_for_the_local_device():
    found = check_command()
    assert found["devices"] == 1
    assert not any(found["collective_bytes"].values())
    assert found["bound"] is found["step_seconds"] is None
    # Encoder and decoder alone: four convolutions of 3 x 3 and 32 channels each, forwards and backwards.
    assert found["flops_per_device"] > 8 * 256 * 3 * 8 * 2 * 9 * 32 * 32


def test_bad_input_is_one_line_and_exit_2():
    result = run("-m", "fvq_jax.plan", *TINY, "--config.mesh.codebook=3")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fvq_jax: tokenizer.quantizer: mesh.codebook 3 does not divide")


def test_slices_need_a_topology():
    assert plan._devices(None, 1) == jax.local_devices()
    with pytest.raises(InputError, match="--slices=2 needs --topology"):
        plan._devices(None, 2)
