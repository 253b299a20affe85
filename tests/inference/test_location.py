import json
from pathlib import Path

import numpy as np
import pytest

import fvq_jax
from fvq_jax.inference.location import locate
from fvq_jax.inference.saved import load, save_folder
from fvq_jax.inference.saved_generator import is_generator, load_generator
from fvq_jax.interop.gpt_checkpoint import write_gpt
from fvq_jax.interop.tokenizer_checkpoint import write_checkpoint
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import flatten
from tests.helpers.random_generator import random_generator
from tests.helpers.random_tokenizer import random_tokenizer


def hugging_face(folder, name="model.safetensors"):
    """A folder with a config of another program, and the path of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vqgan", "_class_name": "VQModel"}))
    return folder / name


def test_the_folder_of_another_program_stands_for_its_weights(tmp_path):
    saved = random_tokenizer(ch_mult=(1,))
    path = hugging_face(tmp_path / "repository")
    write_checkpoint(path, "llamagen", saved.net, saved.params)
    back = load(tmp_path / "repository", layout="llamagen", l2_norm=True)  # which only files take
    assert back.layout == "llamagen"
    assert back.net.quantizer.l2_normalize
    for name, value in flatten(saved.params).items():
        np.testing.assert_array_equal(flatten(back.params)[name], value, err_msg=name, strict=True)
    assert not is_generator(tmp_path / "repository")
    quantizer = fvq_jax.load_quantizer(tmp_path / "repository", "vector")
    np.testing.assert_array_equal(quantizer.variables["params"]["codebook"], saved.params["quantizer"]["codebook"])


def test_a_generator_in_such_a_folder(tmp_path):
    saved = random_generator()
    write_gpt(hugging_face(tmp_path / "repository"), saved.net, saved.params)
    assert is_generator(tmp_path / "repository")
    assert load_generator(tmp_path / "repository").net == saved.net


@pytest.mark.parametrize("lost", ["", "weights.safetensors"])
def test_a_folder_of_ours_is_never_taken_for_another(lost, tmp_path):
    save_folder(tmp_path / "saved", random_tokenizer(ch_mult=(1,)))
    (tmp_path / "saved" / "bridge.safetensors").touch()
    (tmp_path / "saved" / "model.safetensors").touch()
    if lost:
        (tmp_path / "saved" / lost).unlink()
    assert locate(tmp_path / "saved", "tokenizer") == (tmp_path / "saved", None)


def test_a_slip_in_a_path_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "there").mkdir(parents=True)
    (tmp_path / "runs" / "there" / "model.pt").touch()
    monkeypatch.setattr("fvq_jax.inference.location.download", lambda name: pytest.fail(f"{name} was looked up"))
    assert locate("runs/there", "tokenizer")[0] == Path("runs/there/model.pt")
    for path in ("runs/their", "nowhere", "org/x.pt", "a/b/c"):
        with pytest.raises(InputError, match=r"there is no tokenizer at [a-z./]*: the path does not exist$"):
            locate(path, "tokenizer")


def test_what_is_looked_for_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no tokenizer at .*nowhere"):
        locate(tmp_path / "nowhere", "tokenizer")
    with pytest.raises(InputError, match=r"no generator in the folder .* nor a file of weights, such as model\.safe"):
        load_generator(tmp_path)
