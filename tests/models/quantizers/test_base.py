"""The contract of quantizers, on `ema`, which keeps all that it has in `variables`."""

import functools
import inspect
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fvq_jax.config.checks import all_fields, validate
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.quantizers import QUANTIZERS, make_quantizer, quantizer_fields, quantizer_settings
from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import settings_of
from fvq_jax.runtime.mesh import global_batch
from fvq_jax.runtime.names import flatten
from fvq_jax.tasks.tokenizer.fields import use_quantizer
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.loop import train
from fvq_jax.training.state import create_state
from fvq_jax.training.step import TrainStep
from tests.helpers.slow_cases import slow
from tests.helpers.tiny import random_images, tiny_config

MESHES = [(1, 1), (2, 4)]
STATE = ("quantizer/codebook", "quantizer/hits", "quantizer/sums")


def ema_config(**changes):
    config = tiny_config(**{"tokenizer.ch_mult": (1,), "data.image_size": 12, "eval.images": 8, "eval.batch_size": 8})
    use_quantizer(config, "ema", codebook_size=64, code_dim=8, decay=0.5)
    config.update_from_flattened_dict(changes)
    return config


def step_on(data, codebook, **changes):
    devices = jax.devices()[: data * codebook]
    mesh = jax.make_mesh((data, codebook), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    config = ema_config(**changes)
    return TrainStep.of(TokenizerTask(config, mesh), config, mesh, 10, 0)


@functools.cache
def compiled(data, codebook):
    """The step, and the function that takes one from a state on the host, for the batch of a number."""
    step = step_on(data, codebook)
    run, layout = None, jax.tree.map(lambda leaf: leaf.sharding, step.abstract())

    def take(state, number):
        nonlocal run
        state = jax.device_put(state, layout)
        run = run or step.jitted(state)
        return run(state, global_batch({"image": random_images(16, 12, number)}, step.mesh), {})[0]

    return step, take


@functools.cache
def after_three_steps(data, codebook):
    """The step, and the states after 0 to 3 steps, on the host."""
    step, take = compiled(data, codebook)
    state = create_state(step.init, 0, step.abstract())
    states = [jax.device_get(state)]
    for number in range(3):
        state = take(state, number)
        states.append(jax.device_get(state))
    return step, state, states


def kept(state):
    """The quantizer's state by name."""
    return flatten(state.networks["tokenizer"].variables["moving"])


def test_its_state_lies_in_variables_and_is_divided_by_its_own_rules():
    step, state, _ = after_three_steps(2, 4)
    assert tuple(kept(state)) == STATE
    assert "quantizer" not in state.networks["tokenizer"].params
    for leaf in kept(step.abstract()).values():
        assert leaf.sharding.spec == P("codebook")
    for leaf in kept(state).values():
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {64 // 4}


def test_every_step_moves_it():
    _, _, states = after_three_steps(2, 4)
    hits = [float(kept(state)["quantizer/hits"].sum()) for state in states]
    # The batch has 16 x 144 tokens. Codes that were put elsewhere count as much as the average code.
    assert hits[0] == 0
    assert all(before < after < 2 * 16 * 144 for before, after in itertools.pairwise(hits))
    books = [kept(state)["quantizer/codebook"] for state in states]
    assert all(np.abs(after - before).max() > 1e-3 for before, after in itertools.pairwise(books))


@pytest.mark.slow
def test_the_state_is_the_same_on_both_meshes():
    one, eight = (kept(after_three_steps(*sizes)[2][-1]) for sizes in MESHES)
    for name in STATE:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, atol=1e-4)


def test_a_step_that_is_not_finite_leaves_it_alone():
    _, _, states = after_three_steps(2, 4)
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), states[1].networks["tokenizer"].params)
    network = states[1].networks["tokenizer"].replace(params=broken)
    after = compiled(2, 4)[1](states[1].replace(networks={"tokenizer": network}), 0)
    for name, value in kept(states[1]).items():
        np.testing.assert_array_equal(kept(after)[name], value)


@pytest.mark.parametrize(("here", "there"), [(MESHES[1], MESHES[0]), pytest.param(*MESHES, marks=pytest.mark.slow)])
def test_a_checkpoint_brings_it_to_another_mesh(tmp_path, here, there):
    _, state, states = after_three_steps(*here)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, 3, {})
        checkpoints.wait()
        restored = checkpoints.restore(step_on(*there).abstract()).state
    for name, value in kept(restored).items():
        np.testing.assert_array_equal(value, kept(states[-1])[name])
        assert {shard.data.shape[0] for shard in value.addressable_shards} == {64 // there[1]}


@pytest.mark.parametrize("sizes", [MESHES[1], *slow(MESHES[0])])
def test_an_evaluation_uses_it_and_does_not_touch_it(sizes):
    step, state, states = after_three_steps(*sizes)
    found = step.task.evaluate(state, lambda done: None)
    for name, value in kept(state).items():
        np.testing.assert_array_equal(value, kept(states[-1])[name])
    early = step.task.evaluate(
        jax.device_put(states[0], jax.tree.map(lambda leaf: leaf.sharding, state)), lambda done: None
    )
    assert found.metrics["psnr"] != early.metrics["psnr"]
    points, _ = step.task.evaluator.plane(step.task.scored_variables(state))
    assert points.shape == (64, 2)


@pytest.mark.slow
def test_a_run_with_it_resumes_bit_for_bit(tmp_path):
    config = ema_config(steps=3, **{"checkpoint.every_steps": 2})
    train(TokenizerTask, config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step_2", tmp_path / "parts" / "checkpoints" / "step_2")
    train(TokenizerTask, config, tmp_path / "parts")
    states = []
    for name in ("whole", "parts"):
        with Checkpoints(tmp_path / name, read_only=True) as checkpoints:
            states.append(checkpoints.restore(step_on(8, 1).abstract(), 3).state)
    for name, value in kept(states[0]).items():
        np.testing.assert_array_equal(value, kept(states[1])[name])
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())["tokenizer"]["quantizer"]
    assert {name: saved[name] for name in ("name", "codebook_size", "decay")} == {
        **{"name": "ema", "codebook_size": 64, "decay": 0.5},
    }

    # Used after training, it is a plain quantizer that searches the table it has come to.
    tokenizer = Tokenizer.from_pretrained(tmp_path / "whole")
    np.testing.assert_array_equal(tokenizer.codebook, kept(states[0])["quantizer/codebook"])
    codes = tokenizer.encode(random_images(2, 12))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(random_images(2, 12)), codes)
    np.testing.assert_array_equal(again.decode(codes), tokenizer.decode(codes))


def own_fields(kind):
    return {field for field in inspect.get_annotations(kind) if field not in ("rules", "trained", "name", "parent")}


def test_the_settings_of_a_quantizer_are_its_section_and_nothing_else():
    for name, kind in QUANTIZERS.items():
        settings = set(quantizer_fields(name)) - {"name"}
        annotated = {field for part in kind.__mro__[: kind.__mro__.index(Quantizer)] for field in own_fields(part)}
        assert settings == annotated
        assert not settings & set(inspect.get_annotations(TokenizerNet))
    config = ema_config()
    assert set(config.tokenizer.quantizer) == {"name", *settings_of(QUANTIZERS["ema"])}
    fields = all_fields(TokenizerTask, config)
    assert "tokenizer.quantizer.decay" in fields
    assert "tokenizer.quantizer.bridge" not in fields


def test_a_quantizer_is_made_from_its_settings_and_they_from_it():
    settings = {"name": "vector", "codebook_size": 36, "code_dim": 4, "bridge": "linear", "commitment_weight": 1}
    quantizer = make_quantizer(settings)
    assert isinstance(quantizer, VectorQuantizer)
    found = quantizer_settings(quantizer)
    assert {name: found[name] for name in settings} == settings
    assert make_quantizer(found) == quantizer


def refusal(config):
    with pytest.raises(InputError) as refused:
        validate(config, TokenizerTask, 8)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_does_not_fit_a_quantizer_is_refused_with_the_section():
    with pytest.raises(InputError, match="the quantizer ema has no setting bridge: it takes name, codebook_size"):
        use_quantizer(tiny_config(), "ema", bridge="none")
    config = ema_config()
    config.tokenizer.quantizer.name = "vector"
    assert (
        'fields of the section are those of ema: choose the quantizer in a config file, by use_quantizer(config, "vec'
        in (refusal(config))
    )
    config.tokenizer.quantizer.name = "ema"
    with config.unlocked():
        config.tokenizer.quantizer.decai = 0.5
    assert "unknown config field tokenizer.quantizer.decai; did you mean tokenizer.quantizer.decay?" in refusal(config)
    config = ema_config()
    config.tokenizer.quantizer.name = "fancy"
    known = ", ".join(QUANTIZERS)
    assert f"tokenizer.quantizer.name: unknown quantizer 'fancy': use one of {known}" in refusal(config)
    config = ema_config(**{"mesh.codebook": 8, "tokenizer.quantizer.codebook_size": 60})
    assert "tokenizer.quantizer: mesh.codebook 8 does not divide the 60 codes" in refusal(config)


def test_the_base_asks_for_every_part_of_the_contract():
    given = {
        "dtype",
        "mesh",
        "name",
        "parent",
        "scope",
        "rules",
        "uncounted_flops",
        "code_shape",
        "compared",
        "counts",
        "grid",
        "level_of",
        "level_names",
        "only_grid",
        "positions",
        "trained",
        "choices",
        "folded_params",
    }  # these have a default
    for name in {name for name in vars(Quantizer) if not name.startswith("_")} - given:
        assert getattr(VectorQuantizer, name) is not getattr(Quantizer, name), name
