"""What was written at commit 0a70d9e still loads: a workdir, a saved folder, a file of codes.

tests/golden/README.md says how the archive was made. Codes must be equal; pixels may differ by one level, since
processors round differently.
"""

import functools
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from fvq_jax import convert, evaluate
from fvq_jax import tokenize as tokenize_command
from fvq_jax.data.npz_rows import CodeReader
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.tasks.tokenizer.fields import upgraded
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.loop import train
from tests.helpers.golden_case import GOLDEN
from tests.helpers.tiny import tiny_config


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with zipfile.ZipFile(GOLDEN / "written_at_0a70d9e.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def expected(written):
    with np.load(written / "expected.npz") as arrays:
        return dict(arrays)


def assert_same_pixels(decoded, expected):
    pixels = np.round((decoded.astype(np.float64) + 1) * 127.5)
    assert np.abs(pixels - expected["pixels"].astype(np.float64)).max() <= 1


@pytest.mark.parametrize("kind", ["workdir", "saved"])
def test_it_gives_the_codes_and_pixels_that_it_gave(written, expected, kind):
    tokenizer = Tokenizer.from_pretrained(written / kind)
    assert tokenizer.trained_net.quantizer.bridge == "XS/2"
    np.testing.assert_array_equal(tokenizer.encode(expected["images"]), expected["codes"])
    assert_same_pixels(tokenizer.decode(expected["codes"]), expected)


def test_a_file_of_codes_is_read_and_decoded(written, expected, tmp_path, capsys):
    (rows, names), *rest = CodeReader(written / "codes.npz").batches(10)
    assert not rest
    assert names == ["0.png", "1.png", "2.png", "3.png"]
    np.testing.assert_array_equal(rows, expected["codes"])
    arguments = ["decode", str(written / "codes.npz"), str(tmp_path), f"--tokenizer={written / 'saved'}"]
    assert tokenize_command.main(arguments) == 0
    capsys.readouterr()
    decoded = np.stack([np.asarray(Image.open(tmp_path / name)) for name in names])
    assert np.abs(decoded.astype(int) - expected["pixels"].astype(int)).max() <= 1


def test_it_is_converted(written, tmp_path, capsys):
    assert convert.main([str(written / "workdir"), str(tmp_path / "new")]) == 0
    assert "bridge XS/2" in capsys.readouterr().out
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["version"] == 2
    assert config["tokenizer"]["quantizer"]["codebook_size"] == 64


def test_its_workdir_is_evaluated_as_its_config_says(written, tmp_path, capsys):
    arguments = [f"--workdir={written / 'workdir'}", f"--out={tmp_path}", "--images=8", "--batch=8"]
    assert evaluate.main(arguments) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (metrics["size"], metrics["images"], metrics["codebook_size"]) == (16, 8, 64)
    assert metrics["data"] == "bundled photographs, held-out regions"


def test_a_new_run_starts_from_its_workdir(written):
    """`load` is what the loop calls for `init_from`."""
    task = TokenizerTask(tiny_config(**{"tokenizer.attention_levels": (-1,)}), make_mesh(-1, 1))
    params = task.load(str(written / "workdir"))
    shapes = jax.eval_shape(task.init, jax.random.key(0))["tokenizer"]["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    kept = Tokenizer.from_pretrained(written / "saved").trained_params
    jax.tree.map(np.testing.assert_array_equal, params, kept)


def test_its_workdir_is_not_continued_and_stays_as_it_is(written, tmp_path):
    workdir = shutil.copytree(written / "workdir", tmp_path / "workdir")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as refused:
        train(TokenizerTask, tiny_config(), workdir)
    message = str(refused.value)
    assert "\n" not in message
    assert "older version" in message
    assert "--config.init_from=" in message
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_every_field_of_its_config_has_a_name_today(written):
    saved = json.loads((written / "workdir" / "config.json").read_text())
    flat = upgraded(saved)
    config = tiny_config(**{"tokenizer.attention_levels": (-1,), "adversarial.weight": 0.5, "optim.ema_decay": 0.9})
    for name, value in flat.items():
        *sections, last = name.split(".")
        there = functools.reduce(lambda section, part: section[part], sections, config)[last]
        assert there == (tuple(value) if isinstance(value, list) else value), name
    # Fields that were added since.
    new = {"tokenizer.quantizer.init_std", "tokenizer.quantizer.estimator", "tokenizer.quantizer.region_window"}
    new |= {
        "data.max_unreadable",
        "eval.crops",
        "mesh.cpu_devices",
        "tokenizer.quantizer.restart_after",
        "tokenizer.attention_levels",
        "tokenizer.quant_kernel",
    }
    now = upgraded(json.loads(config.to_json()))
    assert {name: value for name, value in now.items() if name not in new} == flat
