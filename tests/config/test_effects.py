import pytest

from fvq_jax.config.checks import all_fields, validate
from fvq_jax.config.effects import too_late, without_effect
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import Needs
from fvq_jax.tasks import TASKS, default_config, task_of
from fvq_jax.tasks.tokenizer.fields import use_quantizer


def config_with(*changes, task="tokenizer"):
    config = default_config(task)
    if task == "tokenizer":
        config.data.source = "photos"
    for change in changes:
        config.update_from_flattened_dict(change)
    return config


def lines(config):
    return without_effect(config, all_fields(task_of(config), config))


OFF = {"adversarial.weight": 0.0}
ON = {"adversarial.weight": 0.5}
IDLE = [
    (OFF, "adversarial.ndf", 32, "adversarial.weight=0.0 does not use it"),
    (OFF, "adversarial.start", 7, "adversarial.weight=0.0"),
    (OFF, "adversarial.adaptive", True, "adversarial.weight=0.0"),
    (OFF, "adversarial.loss", "vanilla", "adversarial.weight=0.0"),
    (
        ON | {"adversarial.discriminator": "stylegan"},
        "adversarial.ndf",
        32,
        "adversarial.discriminator=stylegan does not use it: add --config.adversarial.discriminator=patchgan",
    ),
    ({"optim.train_only": "tokenizer"}, "adversarial.weight", 0.7, "optim.train_only=tokenizer"),
    ({"optim.train_only": "decoder"}, "optim.codebook_learning_rate", 1e-3, "optim.train_only=decoder"),
    ({}, "optim.codebook_decay", "linear", "optim.codebook_learning_rate=0.0"),
    ({"optim.decay": "constant"}, "optim.hold", 0.5, "optim.decay=constant and optim.codebook_decay=constant do not"),
    ({"optim.warmup_epochs": 0.0}, "optim.start_factor", 0.5, "optim.warmup_steps=0 and optim.warmup_epochs=0.0"),
    ({"loss.reconstruction_weight": 0.0}, "loss.reconstruction", "l1", "loss.reconstruction_weight=0.0"),
    ({}, "loss.lpips_path", "x", "loss.vgg16_path=nothing does not use it"),
    ({"data.resize_min": 0}, "data.resize_max", 300, "data.resize_min=0"),
    ({}, "data.max_unreadable", 0.5, "data.source=photos"),
    ({}, "tokenizer.quantizer.entropy_temperature", 0.1, "tokenizer.quantizer.entropy_weight=0.0"),
    (
        {"tokenizer.quantizer.bridge": "linear"},
        "tokenizer.quantizer.bridge_groups",
        "1d",
        "tokenizer.quantizer.bridge=linear",
    ),
]


@pytest.mark.parametrize(("others", "name", "value", "said"), IDLE)
def test_a_changed_field_without_effect_is_named_with_what_switches_it_off(others, name, value, said):
    (line,) = lines(config_with(others, {name: value}))
    assert line.startswith(f"{name} is set, but {said}")
    assert lines(config_with(others)) == []


@pytest.mark.parametrize(("name", "setting"), [("lfq", {"temperature": 0.5}), ("bsq", {"temperature": 0.5})])
def test_settings_of_other_quantizers_too(name, setting):
    config = config_with()
    use_quantizer(config, name, bits=4, entropy_weight=0.0, **setting)
    (line,) = lines(config)
    assert line.startswith("tokenizer.quantizer.temperature is set, but tokenizer.quantizer.entropy_weight=0.0")


@pytest.mark.parametrize(
    ("others", "name", "value"),
    [({}, "eval.top_k", 5), ({}, "log.images", 3), ({"eval.samples": 20, "eval.temperature": 0.0}, "eval.top_p", 0.5)],
)
def test_how_samples_are_drawn_needs_samples(others, name, value):
    (line,) = lines(config_with(others, {name: value}, task="generator"))
    assert line.startswith(f"{name} is set, but eval.")


@pytest.mark.parametrize(
    ("name", "value"),
    [("train_dir", "x"), ("eval_dir", "x"), ("tfds_name", "cifar10"), ("tfds_dir", "x"), ("train_split", "a")],
)
def test_data_that_are_not_used_are_refused(name, value):
    config = config_with({f"data.{name}": value})
    with pytest.raises(InputError, match=rf"data\.{name} is set, but data\.source=photos .* --config\.data\.source="):
        validate(config, task_of(config), 1)


@pytest.mark.parametrize("task", TASKS)
def test_conditions_name_fields_that_there_are(task):
    names = {name for kind in TASKS.values() for name in all_fields(kind)}
    fields = all_fields(TASKS[task])
    for field in fields.values():
        assert {name for need in field.needs for name in need.names} <= names
    assert lines(default_config(task)) == []


def test_a_condition_in_words():
    assert Needs(("a.x",), values=(1, 2)).text() == "a.x=1 or 2"
    assert Needs(("a.x", "a.y")).text() == "a.x or a.y other than 0, nothing"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adversarial.start", "the discriminator is never trained"),
        ("checkpoint.every_steps", "saved at its end only"),
        ("eval.every_steps", "evaluated at its end only"),
        ("log.every_steps", "line of metrics"),
        ("tokenizer.quantizer.region_window", "never chosen"),
    ],
)
def test_what_the_run_does_not_reach_is_named(name, said):
    config = config_with({name: 10})
    fields = all_fields(task_of(config), config)
    late = [line for line in too_late(config, fields, 9) if line.startswith(f"{name}=10 is more than the 9 steps")]
    assert said in late[0]
    assert not [line for line in too_late(config, fields, 10) if line.startswith(name)]


def test_what_is_switched_off_is_not_late():
    config = config_with(OFF, {"adversarial.start": 10})
    assert not [line for line in too_late(config, all_fields(task_of(config), config), 9) if "adversarial" in line]
