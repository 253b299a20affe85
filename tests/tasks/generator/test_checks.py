import re

import jax
import pytest

from fvq_jax.config.checks import all_fields, validate
from fvq_jax.config.explain import explain
from fvq_jax.models.gpt import SIZES
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks.generator.task import GeneratorTask
from fvq_jax.training.step_plan import make_plan, plan_config
from tests.helpers.tiny_generator import tiny_config


def check(devices=8, **changes):
    validate(tiny_config(**changes), GeneratorTask, devices)


def test_the_tiny_config_can_run():
    for devices in (1, 2, 8):
        check(devices)
        check(devices, **{"mesh.codebook": devices})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator.heads": 5}, "generator.width 64 is not divisible by generator.heads 5: set .* to 60 or 65"),
        (
            {"generator.width": 24, "generator.heads": 4},
            "= 6 channels of a head, which is not a multiple of 4: set generator.width to 16 or 32",
        ),
        ({"generator.grid": (4,)}, r"generator.grid must be two positive whole numbers such as \(16, 16\), not \(4,\)"),
        ({"generator.grid": (4, 0)}, "generator.grid must be two positive whole numbers"),
        ({"generator.vocab": 63, "mesh.codebook": 2}, "generator.vocab 63 is not divisible by mesh.codebook=2.* 62 or"),
        (
            {"generator.width": 20, "generator.heads": 5},
            "generator.width 20 is not divisible by mesh.data=8.* 16 or 24",
        ),
        ({"generator.hidden": 20}, r"feed-forward width \(generator.hidden\) 20 is not divisible by mesh.data=8"),
        (
            {"generator.unroll": True, "generator.remat": True},
            "unroll keeps what generator.remat would save: set only one",
        ),
        ({"data.train_dir": ""}, "data.train_dir is empty: set --config.data.train_dir=DIR .*tokenize extract"),
        ({"data.eval_dir": ""}, "data.eval_dir is empty"),
        ({"data.source": "folder"}, "data.source must be one of codes"),
        ({"generator.dtype": "float16"}, "generator.dtype must be one of bfloat16, float32"),
        ({"generator.class_dropout": 1.0}, "generator.class_dropout must be below 1"),
        ({"optim.weight_decay": -0.1}, "optim.weight_decay must be 0 or more"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        check(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("devices", "codebook"), [(16, 1), (64, 1), (64, 4), (256, 2)])
def test_published_sizes_are_divided_over_slices(size, devices, codebook):
    found = SIZES[size]
    changes = {f"generator.{name}": getattr(found, name) for name in ("layers", "width", "heads")}
    check(devices, **changes, **{"mesh.codebook": codebook, "batch_size": devices, "eval.batch_size": devices})


def test_every_field_is_explained():
    text = explain(tiny_config(), all_fields(GeneratorTask))
    for name, field in GeneratorTask.fields().items():
        assert re.search(rf"^{re.escape(name)} = .*{re.escape(field.text)}", text, re.MULTILINE)


def test_a_step_is_planned_without_data():
    config = tiny_config(**{"data.train_dir": "", "data.eval_dir": "", "optim.ema_decay": 0.9, "mesh.codebook": 2})
    plan = make_plan(GeneratorTask, plan_config(GeneratorTask, config, 8), jax.devices())
    assert plan.fits
    assert plan.bytes["batch"] == 16 // 8 * (16 + 1) * 4
    matrices = 2 * (4 * 64**2 + 3 * 64 * 256) + 2 * 64 * 64
    classes, norms = 5 * 64, 5 * 64
    each = 4 * (matrices // 8 + classes // 4 + norms)
    assert plan.bytes["parameters"] == 2 * each  # with the moving average
    assert plan.bytes["optimizer"] == 2 * each + 4 * 4
    assert plan.flops_per_device > 6 * 16 * 16 * matrices / 8
