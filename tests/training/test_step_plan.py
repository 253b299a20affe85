import math
import types

import jax
import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.tasks import TASKS
from fvq_jax.training import step_plan
from fvq_jax.training.step import TrainStep
from tests.helpers.tiny import make_step, tiny_config

TASK = TASKS["tokenizer"]
# As libtpu 0.0.42 reported it for a program of 19 GiB on a v5e.
TOO_LARGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.04G) "
    "exceeds available HBM (15.75G)."
)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def fail_to_compile(monkeypatch, message):
    def compile_it():
        raise jax.errors.JaxRuntimeError(message)

    lowered = types.SimpleNamespace(compile=compile_it)
    monkeypatch.setattr(TrainStep, "jitted", lambda self, state: types.SimpleNamespace(lower=lambda *args: lowered))


@pytest.fixture
def argument_bytes(monkeypatch):
    """Gives the abstract state and the bytes of what a step is called with, without compiling it."""

    def argument_bytes(codebook_axis, **changes):
        fail_to_compile(monkeypatch, TOO_LARGE)
        config = step_plan.plan_config(TASK, tiny_config(**changes | {"mesh.codebook": codebook_axis}), 8)
        state = make_step(config, make_mesh(-1, codebook_axis)).abstract()
        return state, step_plan.make_plan(TASK, config, jax.devices()).bytes

    return argument_bytes


def test_bytes_of_the_arguments_are_those_of_one_device(argument_bytes):
    state, found = argument_bytes(1)
    params = state.networks["tokenizer"].params
    assert found["parameters"] == 4 * count(params)
    assert found["optimizer"] == 2 * 4 * count(params) + found["optimizer"] % (4 * count(params))  # and a few counts
    assert found["optimizer"] % (4 * count(params)) < 64
    assert found["batch"] == 16 // 8 * (16 * 16 * 3 + 4)


@pytest.mark.parametrize("axis", [2, 4])
def test_the_codebook_axis_divides_the_codebook_and_its_moments(argument_bytes, axis):
    codebook = 64 * 8 * 4
    whole, cut = argument_bytes(1)[1], argument_bytes(axis)[1]
    assert whole["parameters"] - cut["parameters"] == codebook - codebook // axis
    assert whole["optimizer"] - cut["optimizer"] == 2 * (codebook - codebook // axis)


def test_frozen_weights_and_moving_averages_count_as_parameters(argument_bytes):
    plain, more = argument_bytes(1)[1], argument_bytes(1, **{"loss.perceptual_weight": 1.0, "optim.ema_decay": 0.9})[1]
    vgg16, heads = 14_714_688, 64 + 128 + 256 + 512 + 512
    assert more["parameters"] == 2 * plain["parameters"] + 4 * (vgg16 + heads)
    assert more["optimizer"] == plain["optimizer"]


def made(passes):
    """A compiled step that never was, for four devices, whose task adds flops of so many passes."""
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
    task = types.SimpleNamespace(uncounted_flops=lambda platform: (4e12, passes))
    needs = {"parameters": 1, "optimizer": 2, "batch": 3, "temporaries": 4, "total": 10}
    return task, step_plan.Plan(True, 4, 16, 100, needs), executable


@pytest.mark.parametrize("passes", [6, 3, 1])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_flops_are_weighted_by_passes(monkeypatch, passes, micro, platform):
    compiled = made(passes)
    monkeypatch.setattr(step_plan, "compile_step", lambda task_class, config, devices: compiled)
    config = tiny_config(**{"optim.accumulate": micro})
    kind = {"tpu": "TPU v5 lite", "cpu": "cpu"}[platform]
    result = step_plan.make_plan(TASK, config, [types.SimpleNamespace(platform=platform, device_kind=kind)] * 4)
    if platform == "cpu":
        assert result.flops_per_device == micro * 1e12 + passes * 1e12
        assert result.bound is result.step_seconds is None
        return
    repeated = 5 * 2 * 8 * 32 * 64
    assert result.flops_per_device == micro * 1e12 + passes * 1e12 + repeated
    compute, memory = result.flops_per_device / 197e12, micro * 819e7 / 819e9
    assert result.bound == ("compute" if compute > memory else "memory")
    assert result.step_seconds == pytest.approx(max(compute, memory))
    assert result.collective_bytes["all-reduce"] == 8 * 32 * 4 * 2 * 3 // 4
    assert (result.fits, result.bytes, result.hbm_bytes) == (True, compiled[1].bytes, 100)


def test_out_of_memory_is_an_answer(monkeypatch):
    fail_to_compile(monkeypatch, TOO_LARGE)
    result = step_plan.make_plan(TASK, step_plan.plan_config(TASK, tiny_config(), 8), jax.devices())
    assert not result.fits
    assert result.hbm_bytes == round(15.75 * 1024**3)
    assert result.bytes["total"] == round(19.04 * 1024**3)
    assert sum(result.bytes.values()) == 2 * result.bytes["total"]
    assert result.flops_per_device is result.bound is result.step_seconds is None


def test_another_failure_is_not_hidden(monkeypatch):
    fail_to_compile(monkeypatch, "INTERNAL: Mosaic failed to compile TPU kernel")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        step_plan.make_plan(TASK, step_plan.plan_config(TASK, tiny_config(), 8), jax.devices())


def search(bytes_of, first, unit, limit, fixed=0):
    """The batch found, and the batches compiled."""
    compiled = [first]

    def needed(batch):
        compiled.append(batch)
        return bytes_of(batch) <= limit, bytes_of(batch)

    found = step_plan.largest_batch(needed, unit, (first, bytes_of(first) <= limit, bytes_of(first)), fixed, limit)
    assert len(compiled) <= step_plan.MAX_COMPILATIONS
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
    planned = step_plan.plan_config(TASK, config, 8)
    assert config.data.source == "folder"
    assert planned.data.source == "photos"
    assert make_step(planned, make_mesh(-1, 1)).task.abstract_frozen().keys() == {"lpips"}
    with pytest.raises(InputError, match="batch_size 16 is below 32 devices"):
        step_plan.plan_config(TASK, config, 32)


@pytest.mark.parametrize(("precision", "passes"), [("highest", 6), ("bf16_3x", 3), ("bf16", 1), ("bf16_rescored", 1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_search_adds_its_products_with_as_many_passes_as_its_precision_takes(precision, passes, accumulate):
    """On a TPU a kernel does it, of which XLA counts nothing: batch x tokens x codes x dimension products."""
    config = tiny_config(**{"tokenizer.quantizer.search_precision": precision, "optim.accumulate": accumulate})
    task = make_step(config, make_mesh(-1, 1)).task
    assert task.uncounted_flops("tpu") == (2 * (16 * 8 * 8) * 64 * 8, passes)
    # On a CPU four blocks, of which XLA counts two, or the one block of the scan.
    assert task.uncounted_flops("cpu")[0] == (0 if precision == "bf16_rescored" else (16 * 8 * 8) * 64 * 8)
