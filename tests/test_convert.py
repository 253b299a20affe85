import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from fvq_jax import convert
from fvq_jax.inference.generator import Generator
from fvq_jax.inference.saved_generator import SavedGenerator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.gpt import GPT, SIZES
from tests.helpers.golden_case import load_case, relative_error
from tests.helpers.random_tokenizer import random_tokenizer

ROOT = pathlib.Path(__file__).parents[1]


def program(*args):
    # One device: the suite's eight simulated ones are not needed and cost compile time.
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "fvq_jax.convert", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_there_and_back_through_all_layouts(tmp_path, capsys):
    case = load_case("fvq_dit")
    safetensors.numpy.save_file(case.weights, tmp_path / "a.safetensors")
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b", "--layout=jax"]) == 0
    assert convert.main([f"{tmp_path}/b", f"{tmp_path}/c.safetensors", "--layout=fvq"]) == 0
    assert convert.main([f"{tmp_path}/c.safetensors", f"{tmp_path}/d.safetensors", "--layout=llamagen"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(value.size for value in case.weights.values()) - 65536
    recognised = (
        f"FVQ tokenizer with a DiT bridge, {count:,} parameters, 256 x 16 codes, bridge dit-S/4, down-sampling 4"
    )
    assert lines[0] == f"{tmp_path}/a.safetensors: {recognised}, read as fvq, FVQ tokenizer"
    assert lines[1].startswith(f"{tmp_path}/b: written, layout jax, ")
    assert lines[2] == f"{tmp_path}/b: {recognised}"
    back = safetensors.numpy.load_file(tmp_path / "c.safetensors")
    assert back.keys() == case.weights.keys()
    for key, value in case.weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    assert convert.main([f"{tmp_path}/d.safetensors", f"{tmp_path}/e"]) == 0
    assert "plain VQ tokenizer, " in capsys.readouterr().out
    codebooks = [Tokenizer.from_pretrained(tmp_path / name).codebook for name in ("b", "e")]
    np.testing.assert_array_equal(*codebooks)


def test_l2_norm_can_be_said(tmp_path, capsys):
    tok = Tokenizer(random_tokenizer(ch_mult=(1,)))
    tok.save_pretrained(tmp_path / "a.safetensors", layout="llamagen")
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b", "--l2_norm=true"]) == 0
    assert "64 x 8 codes, bridge none, unit-length codes, " in capsys.readouterr().out
    assert Tokenizer.from_pretrained(tmp_path / "b").net.quantizer.l2_normalize


def test_a_vqgan_and_what_its_tensors_do_not_tell(tmp_path, capsys):
    tok = Tokenizer(random_tokenizer(ch_mult=(1,)))
    tok.save_pretrained(tmp_path / "a.safetensors", layout="taming")
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b", "--layout=jax"]) == 0
    recognised = capsys.readouterr().out.splitlines()[0]
    assert recognised.endswith("down-sampling 1, read as taming, VQGAN of taming-transformers")
    assert convert.main([f"{tmp_path}/b", f"{tmp_path}/c.safetensors", "--layout=taming"]) == 0
    files = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "c.safetensors")]
    assert files[0] == files[1]
    capsys.readouterr()
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/d", "--source_layout=ibq"]) == 0
    assert "ibq tokenizer, " in capsys.readouterr().out
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/e.safetensors", "--layout=rq_vae"]) == 2
    assert 'the layout "rq_vae" holds residual quantizers only' in capsys.readouterr().err
    assert convert.main([f"{tmp_path}/b", f"{tmp_path}/f", "--scales=1,2"]) == 2
    assert "layout and scales are for files" in capsys.readouterr().err


def test_a_generator_there_and_back(tmp_path, capsys):
    case = load_case("llamagen_gpt")
    safetensors.numpy.save_file(
        {f"model.{key}": value for key, value in case.weights.items()}, tmp_path / "a.safetensors"
    )
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b", "--heads=4", "--grid=4x4"]) == 0
    assert convert.main([f"{tmp_path}/b", f"{tmp_path}/c.safetensors", "--layout=llamagen"]) == 0
    assert convert.main([f"{tmp_path}/c.safetensors", f"{tmp_path}/d"]) == 0  # this file says heads and grid
    lines = capsys.readouterr().out.splitlines()
    count = sum(value.size for value in case.weights.values())
    recognised = (
        f"class-conditional generator, {count:,} parameters, 2 layers of width 64 with 4 heads, "
        "4 x 4 codes out of 128, 10 classes and no class"
    )
    assert [line.partition(": ")[2] for line in lines[::2]] == [recognised] * 3
    assert lines[1].startswith(f"{tmp_path}/b: written, layout jax, ")
    back = safetensors.numpy.load_file(tmp_path / "c.safetensors")
    assert back.keys() == case.weights.keys()
    for key, value in case.weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    logits = Generator.from_pretrained(tmp_path / "d").logits(case.inputs["labels"], case.inputs["indices"])
    assert relative_error(logits, case.outputs["logits"]) < 1e-4


def test_published_sizes_are_named_and_a_missing_row_for_no_class_is_said():
    for name, size in (("LlamaGen-B, ", SIZES["B"]), ("", dataclasses.replace(SIZES["B"], heads=6))):
        net = GPT(64, 10, (2, 2), *dataclasses.astuple(size))
        text = convert.describe_generator(SavedGenerator(net, {"norm": np.zeros(768)}))
        assert text.startswith(f"class-conditional generator, {name}768 parameters, 12 layers of width 768 with")
        assert text.endswith("10 classes and no class")
    text = convert.describe_generator(SavedGenerator(net.clone(class_dropout=0.0), {}))
    assert text.endswith("10 classes without one for no class")


def test_classes_of_a_generator_can_be_said(tmp_path, capsys):
    weights = load_case("llamagen_gpt").weights
    safetensors.numpy.save_file(weights, tmp_path / "a.safetensors")
    options = ["--heads=4", "--grid=2x8", "--classes=11"]
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b", *options]) == 0
    assert "2 x 8 codes out of 128, 11 classes without one for no class" in capsys.readouterr().out
    assert convert.main([f"{tmp_path}/b", f"{tmp_path}/c.safetensors", "--layout=llamagen"]) == 0
    table = safetensors.numpy.load_file(tmp_path / "c.safetensors")["cls_embedding.embedding_table.weight"]
    np.testing.assert_array_equal(table, weights["cls_embedding.embedding_table.weight"])


@pytest.mark.parametrize(
    ("generator", "options", "message"),
    [
        (True, ["--layout=fvq"], "a generator has no layout fvq: use --layout=llamagen or jax"),
        (True, ["--l2_norm=true"], "a.safetensors is a generator, which --l2_norm is not for: leave it out"),
        (True, [], "a.safetensors does not say everything about its network: give heads=N"),
        (False, ["--heads=4"], "a.safetensors is a tokenizer, which --heads is not for: leave it out"),
        (False, ["--grid=4x4"], "a.safetensors is a tokenizer, which --grid is not for: leave it out"),
    ],
)
def test_options_that_do_not_fit_are_refused(generator, options, message, tmp_path, capsys):
    case = load_case("llamagen_gpt" if generator else "llamagen_l2")
    safetensors.numpy.save_file(case.weights, tmp_path / "a.safetensors")
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_the_table_of_a_class_is_chosen_for_llamagen(tmp_path, capsys):
    tok = Tokenizer(random_tokenizer(bridge="dit-XS/2-c5", ch_mult=(1,)))
    tok.save_pretrained(tmp_path / "a")
    for condition in ("3", "null"):
        arguments = [f"{tmp_path}/a", f"{tmp_path}/b.safetensors", "--layout=llamagen", f"--condition={condition}"]
        assert convert.main(arguments) == 0
        assert "FVQ tokenizer with a DiT bridge, " in capsys.readouterr().out
        table = safetensors.numpy.load_file(tmp_path / "b.safetensors")["quantize.embedding.weight"]
        np.testing.assert_array_equal(table, tok.table(int(condition) if condition.isdecimal() else condition))
    assert convert.main([f"{tmp_path}/a", f"{tmp_path}/c.safetensors", "--layout=llamagen"]) == 2
    assert "give condition, a label in 0..4" in capsys.readouterr().err
    assert convert.main([f"{tmp_path}/a", f"{tmp_path}/c", "--condition=3"]) == 2
    assert "condition is for a layout without bridge" in capsys.readouterr().err


@pytest.mark.parametrize("large", [False, True])
def test_large_files_have_a_progress_bar(large, tmp_path, capsys, monkeypatch):
    Tokenizer(random_tokenizer(ch_mult=(1,))).save_pretrained(tmp_path / "a.safetensors", layout="fvq")
    if large:
        monkeypatch.setattr(convert, "LARGE", 1000)
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b"]) == 0
    assert ("reading a.safetensors" in capsys.readouterr().err) == large


def test_the_program_reports_bad_input_in_one_line_and_exits_2(tmp_path):
    code, out, err = program(tmp_path / "nowhere.pt", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err == f"fvq_jax: there is no tokenizer or generator at {tmp_path}/nowhere.pt: the path does not exist\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a"], "the following arguments are required: DST"),
        (["a", "b", "--layout=onnx"], "argument --layout: invalid choice: 'onnx'"),
        (["a", "b", "--grid=16"], "argument --grid: must be rows x columns such as 16x16, not '16'"),
        (["a", "b", "--l2_norm=1"], "argument --l2_norm: must be true or false, not '1'"),
    ],
)
def test_bad_arguments_are_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main(args)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fvq_jax: {message}")
    assert err.endswith("(see python -m fvq_jax.convert --help)\n")
    assert err.count("\n") == 1
