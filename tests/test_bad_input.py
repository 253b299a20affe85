"""Bad and unusual input to every program and public function: one line that a user can act on, and exit code 2.

A case that raises anything but InputError, ends with another code, writes a traceback, or hangs, fails.
"""

import contextlib
import io
import json
import os
import pathlib
import pickle
import signal
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import fvq_jax
from fvq_jax import convert, evaluate, sample, tokenize
from fvq_jax.data import prepare
from fvq_jax.inference.generator import Generator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.runtime import exits
from fvq_jax.runtime.errors import InputError
from tests.helpers.random_generator import random_generator
from tests.helpers.random_tokenizer import random_tokenizer

SECONDS = 60  # after which a case counts as hanging; they take milliseconds
PROGRAMS = {"convert": convert, "evaluate": evaluate, "prepare": prepare, "sample": sample, "tokenize": tokenize}


def _zip(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)


def _folder(path, **files):
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _link(path, to):
    path.symlink_to(to)


def _nan_tensors(path, **tensors):
    safetensors.numpy.save_file({name.replace("__", "."): np.asarray(value) for name, value in tensors.items()}, path)


# What may be given for a file or folder with weights, by the name it gets; each is made at that path.
WEIGHTS = {
    "missing.pt": lambda path: None,
    "missing folder/with spaces.safetensors": lambda path: None,
    "empty.pt": lambda path: path.touch(),
    "empty.pth": lambda path: path.touch(),
    "empty.ckpt": lambda path: path.touch(),
    "empty.safetensors": lambda path: path.touch(),
    "empty": lambda path: path.touch(),
    "leer ÄÖ 模型.safetensors": lambda path: path.touch(),
    "text.pt": lambda path: path.write_text("no weights\n" * 100),
    "text.safetensors": lambda path: path.write_text("no weights\n" * 100),
    "text.txt": lambda path: path.write_text("no weights\n"),
    "page.ckpt": lambda path: path.write_text("<!DOCTYPE html><html>404</html>"),
    "picture.pt": lambda path: Image.new("RGB", (4, 4)).save(path, "PNG"),
    "picture.safetensors": lambda path: Image.new("RGB", (4, 4)).save(path, "PNG"),
    "zip.pt": lambda path: _zip(path, notes="text"),
    "bomb.pt": lambda path: _zip(path, **{"../" * 50 + "etc": "x", "a" * 5000: "y"}),
    "zip_without_content.pt": lambda path: _zip(path, x__data__pkl="", x__version="3"),
    "zip_wrong_pickle.pt": lambda path: _zip(path, x__data__pkl=pickle.dumps(os.getcwd), x__version="3"),
    "pickle.pt": lambda path: path.write_bytes(pickle.dumps({"model": {"a": 1}})),
    "pickle_list.pt": lambda path: path.write_bytes(pickle.dumps([1, 2, 3])),
    "pickle_cut.pt": lambda path: path.write_bytes(pickle.dumps({"model": {"a": 1}})[:-4]),
    "zeros.pt": lambda path: path.write_bytes(bytes(1000)),
    "zeros.safetensors": lambda path: path.write_bytes(bytes(1000)),
    "huge_header.safetensors": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "header_only.safetensors": lambda path: path.write_bytes(_safetensors(b"{}")),
    "header_list.safetensors": lambda path: path.write_bytes(_safetensors(b"[1]")),
    "cut.safetensors": lambda path: path.write_bytes(
        _safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"1234")
    ),
    "unknown_type.safetensors": lambda path: path.write_bytes(
        _safetensors(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234")
    ),
    "whole_numbers.safetensors": lambda path: _nan_tensors(path, encoder__conv_in__weight=np.zeros(3, np.int64)),
    "one_tensor.safetensors": lambda path: _nan_tensors(path, encoder__conv_blocks__0__weight=np.float32([np.nan])),
    "no_dimensions.safetensors": lambda path: _nan_tensors(
        path,
        encoder__conv_blocks__0__weight=np.float32(1),
        quantize__embedding__weight=np.float32(1),
        tok_embeddings__weight=np.float32(2),
    ),
    "nothing_in_it.safetensors": lambda path: _nan_tensors(
        path, encoder__down__0__weight=np.zeros((0, 3), np.float32), quantize__embedding__weight=np.zeros((0, 0))
    ),
    "folder": lambda path: path.mkdir(),
    "folder.safetensors": lambda path: path.mkdir(),
    "config_only": lambda path: _folder(path, config__json="{}"),
    "weights_only": lambda path: _folder(path, weights__safetensors=_safetensors(b"{}")),
    "config_text": lambda path: _folder(path, config__json="text", weights__safetensors=""),
    "config_list": lambda path: _folder(path, config__json="[]", weights__safetensors=""),
    "config_null": lambda path: _folder(path, config__json="null", weights__safetensors=""),
    "config_deep": lambda path: _folder(path, config__json="[" * 100_000, weights__safetensors=""),
    "config_bytes": lambda path: _folder(path, config__json=b"\xff\xfe\x00", weights__safetensors=""),
    "config_foreign": lambda path: _folder(path, config__json='{"model_type": "gpt2"}', weights__safetensors=""),
    "workdir_without_checkpoint": lambda path: (_folder(path, config__json="{}"), (path / "checkpoints").mkdir()),
    "workdir_of_nothing": lambda path: (
        _folder(path, config__json='{"tokenizer": 3, "generator": [], "optim": 1}'),
        (path / "checkpoints").mkdir(),
    ),
    "dangling.pt": lambda path: _link(path, "nowhere"),
    "circle.pt": lambda path: _link(path, "circle.pt"),
    "below_a_file/x.pt": lambda path: path.parent.touch(),
    "pipe.pt": lambda path: os.mkfifo(path),
    "pipe.safetensors": lambda path: os.mkfifo(path),
    "n" * 300 + ".pt": lambda path: None,
}
# What may be given for a folder of pictures.
PICTURES = {
    "missing": lambda path: None,
    "missing with spaces/and ÄÖ": lambda path: None,
    "empty": lambda path: path.mkdir(),
    "file.txt": lambda path: path.write_text("text"),
    "texts": lambda path: _folder(path, a__txt="text"),
    "no_pictures": lambda path: _folder(path, a__png="text", b__jpg="", c__webp=b"RIFF\0\0\0\0WEBP"),
    "cut": lambda path: _folder(path, a__png=b"\x89PNG\r\n\x1a\n" + bytes(9)),
    "not_a_picture.png": lambda path: path.write_text("text"),
    "dangling": lambda path: _link(path, "nowhere"),
    "circle": lambda path: _link(path, "circle"),
    "holds_dangling": lambda path: (path.mkdir(), _link(path / "a.png", "nowhere")),
    "holds_folder_as_picture": lambda path: (path.mkdir(), (path / "a.png").mkdir()),
    "holds_pipe": lambda path: (path.mkdir(), os.mkfifo(path / "a.png")),
    "bad_manifest": lambda path: _folder(path, manifest__json="{"),
    "empty_manifest": lambda path: _folder(path, manifest__json="{}"),
    "n" * 300: lambda path: None,
}


def _npz(**arrays):
    return lambda path: np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})


GRID = np.zeros((2, 8, 8), np.int32)
# What may be given for a file of codes.
CODES = {
    "missing.npz": lambda path: None,
    "empty.npz": lambda path: path.touch(),
    "text.npz": lambda path: path.write_text("text"),
    "folder.npz": lambda path: path.mkdir(),
    "other.npz": _npz(arr_0=GRID),
    "fractions.npz": _npz(codes=GRID + 0.5, names=["a", "b"]),
    "nan.npz": _npz(codes=GRID * np.nan, names=["a", "b"]),
    "negative.npz": _npz(codes=GRID - 1, names=["a", "b"]),
    "too_large.npz": _npz(codes=GRID + 64, names=["a", "b"]),
    "flat.npz": _npz(codes=np.zeros(3, np.int32), names=["a", "b", "c"]),
    "other_rank.npz": _npz(codes=np.zeros((2, 3, 3, 3), np.int32), names=["a", "b"]),
    "few_names.npz": _npz(codes=GRID, names=["a"]),
    "leads_out.npz": _npz(codes=GRID, names=["../a", "/b"]),
    "nameless.npz": _npz(codes=GRID, names=["", "b"]),
    "long_name.npz": _npz(codes=GRID, names=["n" * 300, "b"]),
    "objects.npz": lambda path: np.savez(path, codes=np.array([None, 1], object), names=np.array(["a", "b"])),
    "member_text.npz": lambda path: _zip(path, **{"codes.npy": "text", "names.npy": "text"}),
    "truth.npz": _npz(codes=GRID > 0, names=["a", "b"]),
    "dangling.npz": lambda path: _link(path, "nowhere"),
    "pipe.npz": lambda path: os.mkfifo(path),
}


@contextlib.contextmanager
def _no_hang():
    def stop(number, frame):
        pytest.fail(f"it hangs: {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _run(program, *argv):
    """Exit code and what was written to standard error."""
    err = io.StringIO()
    with _no_hang(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = PROGRAMS[program].main([str(word) for word in argv])
        except SystemExit as ended:
            code = ended.code
    return code, err.getvalue()


def _assert_refused(program, *argv):
    code, said = _run(program, *argv)
    assert code == exits.BAD_INPUT, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("fvq_jax: ") and "skipped" not in line]
    assert len(line) > 20  # it says something


def _assert_raises(function, *args, **keywords):
    with _no_hang(), pytest.raises(InputError) as caught:
        function(*args, **keywords)
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message


def _made(table, name, folder):
    path = folder / name
    if len(path.name) < 256 and "missing" not in name and path.parent != folder and "below" not in name:
        path.parent.mkdir(parents=True)
    table[name](path)
    return path


@pytest.fixture(autouse=True)
def _no_exit(monkeypatch):
    def left(message, *, together=False):
        pytest.fail(f"the process would have ended at once: {message}")

    monkeypatch.setattr(exits, "_leave", left)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with what is right: a tokenizer, a generator, and pictures."""
    folder = tmp_path_factory.mktemp("good")
    Tokenizer(random_tokenizer()).save_pretrained(folder / "tok")
    Generator(random_generator()).save_pretrained(folder / "gen")
    for name, count in (("in", 1), ("many", 20)):
        (folder / name).mkdir()
        for number in range(count):
            Image.new("RGB", (20, 20)).save(folder / name / f"{number}.png")
    np.savez(folder / "codes.npz", codes=GRID, names=np.array(["a", "b"]))
    return folder


@pytest.fixture(scope="module")
def tok():
    return Tokenizer(random_tokenizer())


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_none(name, tmp_path):
    path = _made(WEIGHTS, name, tmp_path)
    _assert_raises(Tokenizer.from_pretrained, path)
    _assert_raises(Generator.from_pretrained, path)
    _assert_raises(fvq_jax.load_quantizer, path, name="vector")
    _assert_refused("convert", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_none(name, tmp_path, good):
    path, tokenizer = _made(PICTURES, name, tmp_path), f"--tokenizer={good / 'tok'}"
    _assert_refused("tokenize", "encode", path, tmp_path / "out.npz", tokenizer, "--size=16")
    assert not (tmp_path / "out.npz").exists()
    if name == "holds_pipe" or "manifest" in name or "missing" in name or name in ("empty", "file.txt", "texts"):
        _assert_refused("evaluate", tokenizer, f"--data={path}", "--size=16", f"--out={tmp_path / 'out'}")
        _assert_refused("tokenize", "extract", tokenizer, f"--data={path}", "--size=16", f"--out={tmp_path / 'codes'}")


@pytest.mark.parametrize("name", CODES)
def test_codes_that_are_none(name, tmp_path, good):
    path = _made(CODES, name, tmp_path)
    _assert_refused("tokenize", "decode", path, tmp_path / "out", f"--tokenizer={good / 'tok'}")


# Options of programs; {good} is the folder of what is right, {out} a new path, {file} a file.
ENCODE = "tokenize encode {good}/in {out} --tokenizer={good}/tok "
EXTRACT = "tokenize extract --tokenizer={good}/tok --data={good}/in --out={out} --size=16 "
EVALUATE = "evaluate --tokenizer={good}/tok --data={good}/in --out={out} --size=16 "
SCORE = "evaluate --samples={good}/many --reference={good}/many --inception={file} --out={out} "
SAMPLE = "sample --generator={good}/gen --tokenizer={good}/tok --out={out} "
DRAW = "evaluate --generator={good}/gen --tokenizer={good}/tok --reference={good}/many --inception={file} --out={out} "


def _each(command, options):
    """The command with every value of every option: "--size: 0 x" are two lines. {} is an empty value."""
    lines = [line.split(":", 1) for line in options.strip().splitlines()]
    return [f"{command}{name.strip()}={value.replace('{}', '')}" for name, values in lines for value in values.split()]


OPTIONS = [
    "tokenize",
    "tokenize nothing",
    "tokenize encode",
    ENCODE,
    *(ENCODE + f"--size={size}" for size in ("0", "-16", "15", "x", "", "1.5", "nan", "99999999999999999999")),
    *(ENCODE + f"--size=16 --batch={batch}" for batch in ("0", "-1", "x", "1e3")),
    ENCODE + "--size=16 --l2_norm=maybe",
    ENCODE + "--size=16 --l2_norm=true",
    ENCODE + "--size=16 --condition=3",
    ENCODE + "--size=16 --condition=-1",
    ENCODE + "--size=16 --bogus",
    "tokenize encode {good}/in {file}/x.npz --tokenizer={good}/tok --size=16",
    "tokenize encode {good}/in {good} --tokenizer={good}/tok --size=16",
    "tokenize decode {good}/codes.npz {file} --tokenizer={good}/tok",
    "tokenize decode {good}/codes.npz {file}/x --tokenizer={good}/tok",
    "tokenize decode {good}/codes.npz {out} --tokenizer={good}/tok --batch=0",
    "tokenize decode {good}/codes.npz {out} --tokenizer=",
    "tokenize decode {good}/codes.npz {out} --tokenizer={good}/gen",
    "evaluate",
    "sample",
    "convert",
    "convert {good}/tok",
    *("convert {good}/tok {out} " + option for option in ("--layout=x", "--layout=llamagen", "--heads=2")),
    *("convert {good}/tok {out} " + option for option in ("--source_layout=fvq", "--scales=0", "--scales=1,x")),
    *("convert {good}/tok {out} " + option for option in ("--condition=null", "--l2_norm=true", "--classes=3")),
    "convert {good}/tok {file}/x",
    "convert {good}/tok {file}",
    "convert {good}/tok {out}.safetensors",
    "convert {good}/tok {file}/x.safetensors --layout=llamagen",
    "convert {good}/tok {out}.txt --layout=llamagen",
    "convert {good}/tok {out}.safetensors --layout=rq_vae",
    "convert {good}/gen {out}.safetensors --layout=fvq",
    "convert {good}/gen {good}/tok",
    "convert {good}/tok {good}/gen",
    "prepare",
    "prepare {good}/in {file}",
    "prepare {good}/in {file}/x",
    *("prepare {good}/in {out} " + option for option in ("--workers=0", "--workers=x", "--shard-size=0")),
    *_each(
        EXTRACT,
        """
        --size: 0 -16 15 x {} 1.5 nan 99999999999999999999
        --crops: {} nine center:2 random random:0 random:-1 random:x random:9999999
        --scales: x nan inf 0 -1 0.5 17 1,,2 ,
        --seed: -1 4294967296 x 1.5
        --condition: label 3 {}
        --batch: 0 -1 x 1e3
        --workers: -1 x
        --shard-size: 0 -1 x
        --timeout: -1 nan x
        --split: train eval test
        --l2_norm: true maybe
        --bogus: 1
        --data: {} tfds: {good}/tok {good}/codes.npz {out}
        --out: {} {good}/in {good}/tok {file} {file}/x
        --tokenizer: {} {good}/gen {good}/in {file} {out}
        --num_processes: 2
        --distributed_timeout: 0 99999999999
        """,
    ),
    *_each(
        EVALUATE,
        """
        --size: 0 -16 15 x {}
        --batch: 0 -1 x
        --images: -1 x
        --crops: -1 x
        --seed: -1 x
        --protocol: other
        --condition: label 3
        --l2_norm: true maybe
        --compare: {} , {good}/gen {out}
        --inception: {} {out} {file} {good}
        --data: {} {good}/tok {good}/codes.npz {out}
        --out: {} {file} {file}/x
        --tokenizer: {} {good}/gen {good}/in {file} {out}
        --workdir: {good}/tok
        --reference: {good}/in
        --guidance: 1
        --count: 3
        --top_k: 3
        --process_id: 0
        """,
    ),
    EVALUATE + "--images=1 --crops=1",
    "evaluate --workdir={good}/gen --out={out}",
    "evaluate --workdir={good}/in --out={out}",
    *_each(
        SCORE,
        """
        --samples: {} , {good}/in {good}/codes.npz {good}/tok {file} {out}
        --guidance: 1,2 x nan {}
        --batch: 0 -1 x
        --reference: {} {file} {good}/tok {good}/codes.npz {out}
        --inception: {} {out} {file} {good}
        --distances: float16
        --data: {good}/in
        --size: 16
        --seed: 1
        --out: {} {file} {file}/x
        """,
    ),
    "evaluate --samples={good}/many --out={out}",
    "evaluate --samples={good}/many --reference={good}/many --out={out}",
    "evaluate --generator={good}/gen --out={out}",
    *_each(
        DRAW,
        """
        --count: 0 -1 x 1
        --guidance: x nan -1 , 1,,2
        --temperature: -1 nan inf x
        --top_k: -1 x 1.5
        --top_p: 0 -1 1.5 nan x
        --schedule: square
        --rounding: up
        --seed: -1 4294967296 x
        --condition: label null
        --generator: {} {good}/tok {out}
        --size: 16
        """,
    ),
    *_each(
        SAMPLE + "--random=1 ",
        """
        --classes: {} 10 -1 x 1,,2 1;2 1.5
        --random: 0 -1 x 99999999999
        --per-class: 1
        --guidance: -1 nan inf x
        --temperature: -1 nan inf x
        --top_k: -1 x 1.5
        --top_p: 0 -1 1.5 nan x
        --schedule: square
        --power: 0 -1 nan
        --interval: -2 x
        --seed: -1 4294967296 x
        --batch: 0 -1 x
        --resize: 0 -1 x 99999999999
        --rounding: up
        --condition: label null
        --dtype: float16
        --use_ema: true maybe
        --heads: 0 -1 3 x
        --grid: 4 0x0 4x x4
        --l2_norm: true maybe
        --generator: {} {good}/tok {good}/in {file} {out}
        --tokenizer: {} {good}/gen {good}/in {file} {out}
        --out: {} {file} {file}/x {good}/tok {good}/in
        --num_processes: 2
        """,
    ),
    SAMPLE,
    SAMPLE + "--per-class=0",
    SAMPLE + "--per-class=99999999999",
]


@pytest.mark.parametrize("line", OPTIONS)
def test_options_that_cannot_be(line, tmp_path, good):
    (tmp_path / "file").write_text("text")
    places = {"good": good, "out": tmp_path / "out", "file": tmp_path / "file"}
    before = sorted(good.rglob("*"))
    _assert_refused(*(word.format(**places) for word in line.split()))
    assert sorted(good.rglob("*")) == before


IMAGES = [
    "text",
    [],
    np.zeros((16, 16, 3), np.uint8),
    np.zeros((1, 3, 16, 16), np.uint8),
    np.zeros((1, 16, 16, 4), np.uint8),
    np.zeros((1, 16, 15, 3), np.uint8),
    np.zeros((1, 0, 0, 3), np.uint8),
    np.zeros((1, 16, 16, 3), np.int64),
    np.zeros((1, 16, 16, 3), bool),
    np.zeros((1, 16, 16, 3), complex),
    np.zeros((1, 16, 16, 3), object),
    np.full((1, 16, 16, 3), np.nan, np.float32),
    np.full((1, 16, 16, 3), np.inf, np.float32),
    np.full((1, 16, 16, 3), 255.0),
    [[1, 2], [3]],
]


@pytest.mark.parametrize("number", range(len(IMAGES)))
@pytest.mark.filterwarnings("ignore:no value of these images")
def test_images_that_are_none(number, tok):
    _assert_raises(tok.encode, IMAGES[number])
    _assert_raises(tok.reconstruct, IMAGES[number])


@pytest.mark.parametrize("value_range", [(1, 0), (0, 0), (np.nan, 1), (0, np.inf)])
def test_a_range_of_values_that_is_none(value_range, tok):
    _assert_raises(tok.encode, np.zeros((1, 16, 16, 3), np.float32), value_range=value_range)


@pytest.mark.parametrize(
    "codes",
    [
        "text",
        [],
        [[1, 2], [3]],
        np.zeros((8, 8), np.int32),
        np.zeros((1, 8, 8), np.float32),
        np.zeros((1, 8, 8, 1), np.int32),
        np.full((1, 8, 8), -1),
        np.full((1, 8, 8), 64),
        np.full((1, 8, 8), np.iinfo(np.uint64).max, np.uint64),
        np.zeros((1, 0, 8), np.int32),
        np.zeros((1, 8, 8), bool),
    ],
)
def test_codes_that_cannot_be_decoded(codes, tok):
    _assert_raises(tok.decode, codes)


@pytest.mark.parametrize(
    ("path", "keywords"),
    [
        ("", {}),
        ("nul\0byte", {}),
        ("x.txt", {"layout": "llamagen"}),
        ("x.safetensors", {}),
        ("x.safetensors", {"layout": "nothing"}),
        ("x.safetensors", {"layout": "fvq", "condition": 3}),
    ],
)
def test_places_to_save_that_cannot_be(path, keywords, tok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({}))  # the folder holds something else
    _assert_raises(tok.save_pretrained, path, **keywords)


@pytest.mark.parametrize("path", ["", "nul\0byte", pathlib.Path("/dev/null"), pathlib.Path("/dev/zero"), "/proc/self"])
@pytest.mark.parametrize("load", [Tokenizer.from_pretrained, Generator.from_pretrained, fvq_jax.load_quantizer])
def test_places_to_load_from_that_cannot_be(path, load):
    _assert_raises(load, path, **({"name": "vector"} if load is fvq_jax.load_quantizer else {}))
