import json
import re

import pytest

from fvq_jax.config.checks import all_fields
from fvq_jax.config.resume import check_continues
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import dotted
from fvq_jax.tasks import task_of
from tests.helpers.tiny import tiny_config


def saved(config):
    return json.loads(config.to_json())


def differences(before, config):
    return check_continues(before, config, all_fields(task_of(config), config))


def test_the_same_config_continues():
    assert differences(saved(tiny_config()), tiny_config()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer.quantizer.bridge", "S/2"),
        ("tokenizer.quantizer.codebook_size", 256),
        ("tokenizer.ch_mult", (1, 2)),
        ("tokenizer.quantizer.l2_normalize", True),
        ("adversarial.weight", 0.5),
        ("data.image_size", 32),
        ("data.source", "folder"),
        ("data.tfds_name", "cifar10"),
        ("data.train_split", "train[:50%]"),
        ("data.flip", False),
        ("seed", 1),
        ("batch_size", 32),
        ("optim.ema_decay", 0.5),
        ("optim.codebook_learning_rate", 1e-3),
    ],
)
def test_another_model_or_other_data_does_not_continue(field, value):
    before = saved(tiny_config())
    old = dotted(before)[field]
    new = list(value) if isinstance(value, tuple) else value
    with pytest.raises(InputError, match=re.escape(f"{field}: {old!r} -> {new!r}")) as caught:
        differences(before, tiny_config(**{field: value}))
    assert "\n" not in str(caught.value)
    assert "another workdir" in str(caught.value)


def test_every_difference_that_matters_is_named_and_no_other():
    config = tiny_config(**{"tokenizer.ch": 64, "data.flip": False, "optim.hold": 0.5})
    with pytest.raises(InputError) as caught:
        differences(saved(tiny_config()), config)
    assert "tokenizer.ch: 32 -> 64" in str(caught.value)
    assert "data.flip: True -> False" in str(caught.value)
    assert "optim.hold" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 8),
        ("optim.learning_rate", 1e-4),
        ("optim.decay", "cosine"),
        ("tokenizer.quantizer.commitment_weight", 1.0),
        ("data.num_workers", 2),
        ("data.train_dir", "elsewhere"),
        ("data.tfds_dir", "elsewhere"),
        ("loss.vgg16_path", "elsewhere"),
        ("mesh.codebook", 2),
        ("eval.images", 8),
        ("log.every_steps", 1),
        ("on_nan", "skip"),
    ],
)
def test_other_differences_continue_and_are_returned_as_text(field, value):
    before = saved(tiny_config())
    lines = differences(before, tiny_config(**{field: value}))
    assert lines == [f"{field}: {dotted(before)[field]!r} -> {value!r}"]


def test_a_field_that_came_later_had_its_default_before():
    default = {"tokenizer.attention_levels": (-1,)}
    before = saved(tiny_config(**default))
    del before["tokenizer"]["attention_levels"]
    assert differences(before, tiny_config(**default)) == []
    with pytest.raises(InputError, match=r"tokenizer\.attention_levels: \[-1\] -> \[0, 1\]"):
        differences(before, tiny_config(**{"tokenizer.attention_levels": (0, 1)}))


def test_a_field_that_only_the_saved_config_has_belonged_to_another_model():
    before = saved(tiny_config())
    before["tokenizer"]["quantizer"]["levels"] = 4
    with pytest.raises(InputError, match=r"tokenizer\.quantizer\.levels: 4 -> None"):
        differences(before, tiny_config())


def test_a_run_of_an_older_version_is_refused_with_what_can_be_done():
    before = saved(tiny_config())
    del before["task"]
    with pytest.raises(InputError, match="older version of fvq_jax") as caught:
        differences(before, tiny_config())
    assert "--config.init_from=THIS_WORKDIR" in str(caught.value)
    assert "\n" not in str(caught.value)
