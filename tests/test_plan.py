import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest

from fvq_jax import plan
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.tasks.tokenizer.task import TokenizerTask, abstract_frozen
from fvq_jax.training.state import abstract_state
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
    "--config.tokenizer.quantizer.codebook_size=64",
    "--config.tokenizer.quantizer.bridge=XS/2",
    "--config.adversarial.weight=0.0",
    "--config.data.image_size=16",
)
# As libtpu 0.0.42 reported it for a program of 19 GiB on a v5e.
TOO_LARGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.04G) "
    "exceeds available HBM (15.75G)."
)


def run(*args):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def argument_bytes(codebook_axis, **changes):
    config = tiny_config(**changes)
    mesh = make_mesh(-1, codebook_axis)
    frozen = abstract_frozen(config, mesh)
    task = TokenizerTask(config, mesh, 2, 1, frozen=frozen)
    state = abstract_state(task.init, mesh)
    return state, plan._argument_bytes(state, plan._abstract_batch(config, mesh), frozen)


def test_bytes_of_the_arguments_are_those_of_one_device():
    state, found = argument_bytes(1)
    params = state.networks["tokenizer"].params
    assert found["parameters"] == 4 * count(params)
    assert found["optimizer"] == 2 * 4 * count(params) + found["optimizer"] % (4 * count(params))  # and a few counts
    assert found["optimizer"] % (4 * count(params)) < 64
    assert found["batch"] == 16 // 8 * (16 * 16 * 3 + 4)


@pytest.mark.parametrize("axis", [2, 4])
def test_the_codebook_axis_divides_the_codebook_and_its_moments(axis):
    codebook = 64 * 8 * 4
    whole, cut = argument_bytes(1)[1], argument_bytes(axis)[1]
    assert whole["parameters"] - cut["parameters"] == codebook - codebook // axis
    assert whole["optimizer"] - cut["optimizer"] == 2 * (codebook - codebook // axis)


def test_frozen_weights_and_moving_averages_count_as_parameters():
    plain, more = argument_bytes(1)[1], argument_bytes(1, **{"loss.perceptual_weight": 1.0, "optim.ema_decay": 0.9})[1]
    vgg16, heads = 14_714_688, 64 + 128 + 256 + 512 + 512
    assert more["parameters"] == 2 * plain["parameters"] + 4 * (vgg16 + heads)
    assert more["optimizer"] == plain["optimizer"]


@pytest.fixture
def made():
    """A compiled step that never was: 4 x v5e, the fields that a plan is made from."""
    text = (
        "ENTRY %main (p: f32[8,64], q: f32[64,32]) -> f32[8,32] {\n"
        "  %p = f32[8,64]{1,0} parameter(0)\n"
        "  %q = f32[64,32]{1,0} parameter(1)\n"
        "  %c = f32[8,32]{1,0} convolution(%p, %q), dim_labels=bf_io->bf, operand_precision={highest,highest}\n"
        "  ROOT %r = f32[8,32]{1,0} all-reduce(%c), replica_groups={{0,1,2,3}}, to_apply=%c2\n"
        "}\n"
        "%c2 (x: f32[]) -> f32[] {\n"
        "  ROOT %x = f32[] parameter(0)\n"
        "}\n"
    )
    executable = types.SimpleNamespace(
        as_text=lambda: text, cost_analysis=lambda: {"flops": 1e12, "bytes accessed": 819e7}
    )
    task = types.SimpleNamespace(uncounted_flops=lambda batch: 4e12)
    needs = {"parameters": 1, "optimizer": 2, "batch": 3, "temporaries": 4, "total": 10}
    return task, plan.Plan(True, 4, 16, 100, needs), executable


@pytest.mark.parametrize(("precision", "passes"), [("highest", 6), ("bf16_3x", 3), ("bf16", 1), ("bf16_rescored", 1)])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_flops_are_weighted_by_passes(monkeypatch, made, precision, passes, micro, platform):
    monkeypatch.setattr(plan, "compile_step", lambda config, devices: made)
    config = tiny_config(**{"tokenizer.quantizer.search_precision": precision, "optim.accumulate": micro})
    kind = {"tpu": "TPU v5 lite", "cpu": "cpu"}[platform]
    result = plan.make_plan(config, [types.SimpleNamespace(platform=platform, device_kind=kind)] * 4)
    if platform == "cpu":
        assert result.flops_per_device == micro * 1e12 + 1e12
        assert result.bound is result.step_seconds is None
        return
    repeated = 5 * 2 * 8 * 32 * 64
    assert result.flops_per_device == micro * 1e12 + passes * 1e12 + repeated
    compute, memory = result.flops_per_device / 197e12, micro * 819e7 / 819e9
    assert result.bound == ("compute" if compute > memory else "memory")
    assert result.step_seconds == pytest.approx(max(compute, memory))
    assert result.collective_bytes["all-reduce"] == 8 * 32 * 4 * 2 * 3 // 4
    assert (result.fits, result.bytes, result.hbm_bytes) == (True, made[1].bytes, 100)


def fail_to_compile(monkeypatch, message):
    def compile_it():
        raise jax.errors.JaxRuntimeError(message)

    lowered = types.SimpleNamespace(compile=compile_it)
    monkeypatch.setattr(
        TokenizerTask, "jitted_step", lambda self, state: types.SimpleNamespace(lower=lambda *args: lowered)
    )


def test_out_of_memory_is_an_answer(monkeypatch):
    fail_to_compile(monkeypatch, TOO_LARGE)
    result = plan.make_plan(plan.plan_config(tiny_config(), 8), jax.devices())
    assert not result.fits
    assert result.hbm_bytes == round(15.75 * 1024**3)
    assert result.bytes["total"] == round(19.04 * 1024**3)
    assert sum(result.bytes.values()) == 2 * result.bytes["total"]
    assert result.flops_per_device is result.bound is result.step_seconds is None
    table = plan._table(dataclasses.asdict(result), tiny_config(), jax.devices())
    assert re.search(r"^fits +no$", table, re.MULTILINE)
    assert re.search(r"^memory per device +19.04 GiB of 15.75 GiB$", table, re.MULTILINE)


def test_another_failure_is_not_hidden(monkeypatch):
    fail_to_compile(monkeypatch, "INTERNAL: Mosaic failed to compile TPU kernel")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        plan.make_plan(plan.plan_config(tiny_config(), 8), jax.devices())


def search(bytes_of, first, unit, limit, fixed=0):
    """The batch found, and the batches compiled."""
    compiled = [first]

    def needed(batch):
        compiled.append(batch)
        return bytes_of(batch) <= limit, bytes_of(batch)

    found = plan.largest_batch(needed, unit, (first, bytes_of(first) <= limit, bytes_of(first)), fixed, limit)
    assert len(compiled) <= plan.MAX_COMPILATIONS
    assert all(batch > 0 and batch % unit == 0 for batch in compiled)
    assert found == max([batch for batch in compiled if bytes_of(batch) <= limit], default=0)
    return found, compiled


@pytest.mark.parametrize("first", [16, 256, 4096, 65536])
@pytest.mark.parametrize("unit", [8, 16])
def test_the_largest_batch_of_a_linear_need_is_found(first, unit):
    found, compiled = search(lambda batch: 10**9 + 10**6 * batch, first, unit, 5 * 10**9 + 123, fixed=10**8)
    assert found == 4000
    assert len(compiled) <= 4  # and none to see that one unit more would not fit


@pytest.mark.parametrize(
    "bytes_of",
    [
        lambda batch: 10**9 + 10**6 * batch + 10**3 * batch**2,
        lambda batch: 10**9 + int(10**7 * batch**0.7),
        lambda batch: 10**9 + 10**6 * batch if batch < 1000 else 10**9 + 2 * 10**6 * batch,
    ],
    ids=["steeper", "flatter", "jump"],
)
@pytest.mark.parametrize("first", [64, 8192])
def test_a_need_that_is_not_linear_is_closed_in_on(bytes_of, first):
    limit = 5 * 10**9
    best = max(batch for batch in range(16, 10**5, 16) if bytes_of(batch) <= limit)
    assert 0.7 * best <= search(bytes_of, first, 16, limit, fixed=10**8)[0] <= best


def test_nothing_fits():
    found, compiled = search(lambda batch: 10**10 + batch, 256, 16, 10**9, fixed=10**8)
    assert found == 0
    assert 16 in compiled


def test_one_unit_below_what_does_not_fit_nothing_is_left_to_try():
    assert search(lambda batch: 10**6 * batch, 32, 16, 31 * 10**6)[1] == [32, 16]


def test_pictures_and_evaluation_play_no_part_in_a_plan():
    config = tiny_config(**{"data.source": "folder", "eval.batch_size": 3, "loss.perceptual_weight": 1.0})
    planned = plan.plan_config(config, 8)
    assert config.data.source == "folder"
    assert abstract_frozen(planned, make_mesh(-1, 1)).keys() == {"lpips"}
    with pytest.raises(InputError, match="batch_size 16 is below 32 devices"):
        plan.plan_config(config, 32)


def test_the_short_form_of_a_mesh():
    assert plan._with_mesh(tiny_config(), ["2", "4"]).mesh.to_dict() == {"data": 2, "codebook": 4}
    assert plan._with_mesh(tiny_config(), None).mesh.to_dict() == {"data": -1, "codebook": 1}
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


def check_command(*args):
    """Runs the program on the tiny config with 2 x 2 devices, and checks its one JSON object."""
    result = run("-m", "fvq_jax.plan", *TINY, "--json", *args)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    assert result.stdout.count("\n") == 1
    assert found["fits"]
    assert found["batch"] == 8
    assert found["hbm_bytes"] > found["bytes"]["total"] > 0
    assert sum(found["bytes"].values()) == 2 * found["bytes"]["total"]
    return found


@needs_libtpu
def test_a_plan_for_a_tpu_that_is_not_here():
    found = check_command("--topology=v5e:2x2", "--mesh=2,2")
    assert found["devices"] == 4
    assert found["hbm_bytes"] == round(15.75 * 1024**3)
    # The latents of a codebook group: 2 images of 16 x 16 tokens each, 16 dimensions; and their gradient.
    assert found["collective_bytes"]["all-gather"] >= 2 * 2 * 256 * 16 * 4
    assert found["collective_bytes"]["all-reduce"] > 0
    assert found["bound"] in ("compute", "memory", "network")
    assert 0 < found["step_seconds"] < 1


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
    assert line.startswith("fvq_jax: mesh.codebook 3 does not divide")


def test_slices_need_a_topology():
    assert plan._devices(None, 1) == jax.local_devices()
    with pytest.raises(InputError, match="--slices=2 needs --topology"):
        plan._devices(None, 2)
