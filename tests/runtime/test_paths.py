"""`~` stands for the home directory everywhere, and paths that Orbax takes for patterns are refused."""

import os

import pytest

from fvq_jax.data.decode import UnreadableImageError, open_image
from fvq_jax.data.npz_rows import CodeReader, ImageReader
from fvq_jax.evals.inception import load_inception
from fvq_jax.evals.reference import read_statistics
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.interop.lpips import load_lpips
from fvq_jax.interop.torch_file import read_tensors
from fvq_jax.runtime.arguments import Parser
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.paths import require_content, require_no_pattern, require_there, with_home
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


READERS = {
    "x.pt": read_tensors,
    "y.pt": Tokenizer.from_pretrained,
    "x.safetensors": read_tensors,
    "x.safetensors.index.json": read_tensors,
    "vgg.pth": lambda path: load_lpips("", path),
    "inception.pth": load_inception,
    "codes.npz": CodeReader,
    "pictures.npz": ImageReader,
    "statistics.npz": read_statistics,
    "x": lambda path: require_there(path, "thing"),
    "y": require_content,
    "x.png": open_image,
    "y.png": lambda path: open_image(path.read_bytes()),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_of_git_lfs_is_told_from_the_file(name, tmp_path):
    path = tmp_path / name
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises((InputError, UnreadableImageError), match=r"a Git-LFS pointer and not .*: run `git lfs pull`"):
        READERS[name](path)
