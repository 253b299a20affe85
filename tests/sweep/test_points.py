import dataclasses
import json
import os
import pathlib
import sys

import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.sweep import points as points_module
from fvq_jax.sweep.points import (
    Point,
    command,
    is_finished,
    joined_argument,
    make_points,
    point_name,
    read_record,
    read_sweep,
    try_lock,
    write_record,
)
from tests.helpers.tiny import tiny_config


def make(sweep, workdir=pathlib.Path("sweep"), given=None, **changes):
    return make_points(tiny_config(**changes), sweep, workdir, given)


def config_file(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


def test_names_say_what_is_overridden_and_are_safe():
    assert point_name({}) == "base"
    assert (
        point_name({"tokenizer.quantizer.bridge": "none", "optim.decay": "cosine"})
        == "tokenizer.quantizer.bridge=none,optim.decay=cosine"
    )
    assert point_name({"tokenizer.quantizer.bridge": "dit-L/4-d1"}) == "tokenizer.quantizer.bridge=dit-L-4-d1"
    assert point_name({"tokenizer.ch_mult": (1, 2), "optim.learning_rate": 1e-4, "data.flip": False}) == (
        "tokenizer.ch_mult=1-2,optim.learning_rate=0.0001,data.flip=False"
    )
    assert point_name({"data.train_dir": "/a b/../é:*"}) == "data.train_dir=-a-b-..-"


def test_long_names_are_cut_and_stay_apart():
    names = [point_name({"data.train_dir": "x" * 200, "seed": seed}) for seed in (0, 1)]
    assert [len(name) for name in names] == [100, 100]
    assert names[0] != names[1]
    assert names[0] == point_name({"data.train_dir": "x" * 200, "seed": 0})
    assert names[0].startswith("data.train_dir=xxx")


def test_a_point_may_be_another_config_of_the_file():
    """Not a field, so that it reaches the program as the argument of its config."""
    made = []

    def with_argument(argument):
        made.append(argument)
        return tiny_config(**{"tokenizer.quantizer.codebook_size": 16})

    sweep = [{"seed": 1}, {"argument": "small=16", "seed": 1}]
    first, second = make_points(tiny_config(), sweep, pathlib.Path("sweep"), None, with_argument)
    assert made == ["small=16"]
    assert [point.config["tokenizer.quantizer.codebook_size"] for point in (first, second)] == [64, 16]
    assert second.name == "argument=small-16,seed=1"
    assert second.overrides == {"argument": "small=16", "seed": 1}
    for file, shown in (("c.py", "c.py:small=16"), ("c.py:smoke", "c.py:smoke,small=16")):
        arguments = command(second, file, {})[3:]
        assert arguments == [f"--config={shown}", f"--workdir={second.workdir}", "--config.seed=1"]


def test_a_sweep_gets_the_argument_of_its_config(tmp_path):
    path = config_file(tmp_path, "def sweep(arg=''):\n    yield {'seed': len(arg)}\n")
    assert read_sweep(path) == [{"seed": 0}]
    assert read_sweep(f"{path}:smoke") == [{"seed": 5}]


def test_a_sweep_need_not_take_the_argument(tmp_path):
    path = config_file(tmp_path, "def sweep():\n    yield {'seed': 1}\n    yield {'seed': 2}\n")
    assert read_sweep(f"{path}:smoke") == [{"seed": 1}, {"seed": 2}]


@pytest.mark.parametrize(
    ("text", "message"), [("", r"has no sweep\(\)"), ("def sweep():\n    yield from ()\n", "yields no point")]
)
def test_a_config_without_points_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_sweep(config_file(tmp_path, text))


def test_a_point_is_the_config_with_its_overrides(tmp_path):
    first, second = make([{"tokenizer.quantizer.bridge": "none"}, {"optim.hold": 0}], tmp_path)
    assert (first.index, second.index) == (0, 1)
    assert first.workdir == tmp_path / "tokenizer.quantizer.bridge=none"
    assert first.config["tokenizer.quantizer.bridge"] == "none"
    assert second.config["tokenizer.quantizer.bridge"] == "XS/2"
    assert second.config["optim.hold"] == 0
    assert first.config == json.loads(json.dumps(first.config))
    assert first.refused == second.refused == ""


def test_what_cannot_run_is_kept_with_the_reason():
    fine, wrong = make([{}, {"tokenizer.quantizer.codebook_size": 1000}])
    assert fine.refused == ""
    assert "1000 codes are not a square" in wrong.refused


@pytest.mark.parametrize(
    ("sizes", "devices"), [((-1, 1), 1), ((2, 4), 8), ((-1, 2), 2), ((4, -1), 4)], ids=lambda value: str(value)
)
def test_a_point_says_how_many_devices_it_needs(sizes, devices):
    (point,) = make([{"mesh.data": sizes[0], "mesh.codebook": sizes[1]}])
    assert point.devices == devices
    assert point.refused == ""


def test_a_field_that_the_config_of_a_point_lacks_is_refused():
    def with_argument(argument):
        raise KeyError('Key "bridge" does not exist')

    with pytest.raises(InputError, match=r'^point 0 of the sweep, argument=small: Key "bridge" does not exist$'):
        make_points(tiny_config(), [{"argument": "small"}], pathlib.Path("sweep"), None, with_argument)


def test_an_argument_that_is_given_and_swept_is_refused():
    assert joined_argument("c.py:smoke,a=1", "b=2,c") == "c.py:smoke,a=1,b=2,c"
    with pytest.raises(InputError, match=r"the argument b of c\.py:smoke,b=1 is what this sweep varies"):
        joined_argument("c.py:smoke,b=1", "a=1,b=2")


@pytest.mark.parametrize(
    ("sweep", "given", "message"),
    [
        ([{"optim.lerning_rate": 1.0}], {}, "point 0 of the sweep, optim.lerning_rate=1.0"),
        ([{"optim.hold": "much"}], {}, "point 0 of the sweep, optim.hold=much"),
        ([{"seed": 1}, {"seed": 1}], {}, "points 0 and 1 of the sweep are both called seed=1"),
        ([{"seed": 1}], {"seed": 2}, "--config.seed is what this sweep varies"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep, given, message):
    with pytest.raises(InputError, match=message):
        make(sweep, given=given)


def test_the_command_hands_on_what_was_given_and_what_the_point_replaces():
    (point,) = make([{"tokenizer.ch_mult": (1, 2)}], given={"data.train_dir": "my photos"})
    assert command(point, "configs/x.py:smoke", {"data.train_dir": "my photos"}) == [
        *(sys.executable, "-m", "fvq_jax.main", "--config=configs/x.py:smoke"),
        f"--workdir={point.workdir}",
        "--config.data.train_dir=my photos",
        "--config.tokenizer.ch_mult=1,2",
    ]


def test_a_finished_point_counts_only_with_the_very_same_config(tmp_path):
    (point,) = make([{"seed": 1}], tmp_path)
    point.workdir.mkdir()
    assert not is_finished(point)
    write_record(point, "running")
    assert not is_finished(point)
    write_record(point, "finished", exit_code=0, summary={"usage": 1.0})
    assert is_finished(point)
    assert read_record(point.workdir).summary == {"usage": 1.0}
    older = {name: value for name, value in point.config.items() if name != "eval.crops"}
    write_record(dataclasses.replace(point, config=older), "finished")  # by a version without this field
    assert is_finished(point)
    (divided,) = make([{"seed": 1}], tmp_path, **{"mesh.cpu_devices": 0})
    assert is_finished(divided)
    (later,) = make([{"seed": 1}], tmp_path, **{"eval.images": 0, "eval.crops": 5})
    assert later.workdir == point.workdir
    assert not is_finished(later)
    (changed,) = make([{"seed": 1}], tmp_path, **{"tokenizer.quantizer.code_dim": 16})
    assert changed.workdir == point.workdir
    assert not is_finished(changed)
    assert os.listdir(point.workdir) == [points_module.RECORD]


def test_a_file_that_is_no_record_is_refused(tmp_path):
    for text in ('{"index": 0', "[]", '{"index": 0, "surplus": 1}'):
        (tmp_path / points_module.RECORD).write_text(text)
        with pytest.raises(InputError, match=r"point\.json is not the record of a point"):
            read_record(tmp_path)


def test_only_one_can_hold_a_lock(tmp_path):
    lock = try_lock(tmp_path)
    assert try_lock(tmp_path) is None
    os.close(lock)
    again = try_lock(tmp_path)
    assert again is not None
    os.close(again)


def test_the_last_part_of_the_workdir_is_the_name():
    assert Point(0, {}, {}, pathlib.Path("a/b"), 1).name == "b"
