"""`~` stands for the home directory everywhere, and paths that Orbax takes for patterns are refused."""

import os

import pytest

from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.runtime.arguments import Parser
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.paths import require_no_pattern, with_home
from fvq_jax.tasks import TASKS
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.loop import train
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.regression import RegressionTask, regression_config


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/runs", "HOME/runs"),
        ("--workdir=~/runs", "--workdir=HOME/runs"),
        ("--config.data.train_dir=~", "--config.data.train_dir=HOME"),
        ("--compare=~/a,b,~/c", "--compare=HOME/a,b,HOME/c"),
        ("runs/~/x", "runs/~/x"),
        ("--name=a~", "--name=a~"),
        ("--name=~a b", "--name=~a b"),
    ],
)
def test_the_home_directory_in_an_argument(given, meant, home):
    assert with_home([given]) == [meant.replace("HOME", str(home))]


def test_a_command_line_is_read_with_it(home):
    parser = Parser(prog="x")
    parser.add_argument("--out")
    assert parser.parse_args(["--out=~/here"]).out == f"{home}/here"


def test_the_python_interface_knows_it(home):
    Tokenizer(random_tokenizer(bridge="none")).save_pretrained("~/tok")
    assert os.listdir(home) == ["tok"]
    assert Tokenizer.from_pretrained("~/tok").table().shape


@pytest.mark.parametrize("name", ["run[1]", "a*", "b?", "c\\d", "x]"])
def test_a_path_that_orbax_would_glob_is_refused_before_anything_is_made(name, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "regression", RegressionTask)
    folder = tmp_path / name / "run"
    for use in (require_no_pattern, Checkpoints, lambda path: train(RegressionTask, regression_config(), path)):
        with pytest.raises(InputError, match=r"has a '.{1,2}', with which checkpoints could not be read"):
            use(folder)
    assert os.listdir(tmp_path) == []
