import os
import subprocess
import sys

import pytest

from fvq_jax.config.checks import all_fields
from fvq_jax.config.explain import explain
from fvq_jax.config.fields import make_config
from fvq_jax.runtime.fields import Field
from fvq_jax.runtime.names import dotted
from fvq_jax.tasks import task_of
from tests.helpers.tiny import tiny_config

FIELDS = {
    "optim.hold": Field(0.3, "How long."),
    "seed": Field(0, "What decides.", stays=True),
    "net.mult": Field((1, 2), "How wide."),
    "optim.decay": Field("linear", "How it falls.", choices=("", "linear")),
    "data.dir": Field("", "Where from."),
}


def lines(**changes):
    config = make_config(FIELDS)
    config.update_from_flattened_dict(changes)
    return explain(config, FIELDS).splitlines()


def test_every_field_has_a_line_with_value_and_meaning_and_sections_stay_together():
    assert [" ".join(line.split()) for line in lines()] == [
        "seed = 0 What decides. Must not change when a run is resumed.",
        "data.dir = '' Where from.",
        "net.mult = 1,2 How wide.",
        "optim.hold = 0.3 How long.",
        "optim.decay = linear How it falls. One of nothing, linear.",
    ]


@pytest.mark.parametrize(
    ("change", "shown", "default"),
    [
        ({"optim.hold": 0.5}, "optim.hold = 0.5 ", "(default: 0.3)"),
        ({"net.mult": (1,)}, "net.mult = 1 ", "(default: 1,2)"),
        ({"data.dir": "here"}, "data.dir = here ", "(default: '')"),
    ],
)
def test_a_value_that_is_not_the_default_is_shown_with_it(change, shown, default):
    (line,) = [line for line in lines(**change) if "default" in line]
    assert line.startswith(shown)
    assert line.endswith(default)


def test_meanings_begin_in_one_column():
    found = lines()
    (column,) = {line.index(field.text) for field in FIELDS.values() for line in found if field.text in line}
    assert all(line[column - 1] == " " for line in found)


def test_all_fields_of_a_task_are_explained():
    config = tiny_config()
    text = explain(config, all_fields(task_of(config), config))
    assert {line.split(" = ")[0] for line in text.splitlines()} == dotted(config).keys()
    assert "tokenizer.quantizer.code_dim = 8 " in text


def test_the_program_explains_the_config_of_a_command_line_and_runs_nothing(tmp_path):
    command = [sys.executable, "-m", "fvq_jax.main", "--config=configs/quickstart.py", "--config.optim.hold=0.25"]
    command += ["--explain", f"--workdir={tmp_path / 'run'}"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}, check=True)
    assert "optim.hold = 0.25 " in ended.stdout
    assert "tokenizer.quantizer.bridge = S/2 " in ended.stdout
    assert ended.stdout.count("\n") == len(dotted(tiny_config()))
    assert ended.stderr == ""
    assert not list(tmp_path.iterdir())
