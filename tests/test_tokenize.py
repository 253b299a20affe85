import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fvq_jax import tokenize
from fvq_jax.data.codes import open_codes
from fvq_jax.data.croppings import Cropping
from fvq_jax.data.decode import open_image
from fvq_jax.data.transforms import resize_center
from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.quantizers.multi_scale import MultiScaleQuantizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.ops.pixels import to_uint8
from tests.data.test_prepare import run as prepare
from tests.data.test_tfds import write_data_set
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.two_hosts import free_port, start_host

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tok"
    Tokenizer(random_tokenizer(bridge="none")).save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"cats/a.png": (20, 30), "cats/b.jpg": (16, 16), "dogs/a.webp": (40, 17), "dogs/z/c.png": (33, 33)}
    sizes |= {f"more/{i}.png": (16, 16) for i in range(5)}
    for name, (height, width) in sizes.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def test_a_single_picture_is_named_by_its_file(saved, folder, tmp_path):
    picture, out = folder / "cats" / "a.png", tmp_path / "codes.npz"
    assert tokenize.main(["encode", str(picture), str(out), f"--tokenizer={saved}", "--size=16"]) == 0
    with np.load(out) as file:
        assert file["names"].tolist() == ["a.png"]


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_a_signal_keeps_whole_files_only_and_says_so(saved, folder, tmp_path, capsys, monkeypatch, command):
    codes, out = tmp_path / "codes.npz", tmp_path / "out"
    options = (f"--tokenizer={saved}", "--batch=4")
    if command == "decode":
        assert tokenize.main(["encode", str(folder), str(codes), *options, "--size=16"]) == 0
    works, calls = getattr(Tokenizer, command), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return works(*args)

    monkeypatch.setattr(Tokenizer, command, interrupted)
    args = [str(folder), str(codes), "--size=16"] if command == "encode" else [str(codes), str(out)]
    assert tokenize.main([command, *args, *options]) == 143
    kept = "nothing was written" if command == "encode" else "the pictures written so far are whole"
    assert capsys.readouterr().err.splitlines()[-1] == f"fvq_jax: interrupted by SIGTERM: {kept}"
    assert codes.exists() == (command == "decode")
    assert len([path for path in out.rglob("*") if path.is_file()]) == (0 if command == "encode" else 4)


def test_a_folder_becomes_codes_and_pictures_again(saved, folder, tmp_path, capsys):
    (folder / "cats" / "broken.jpg").write_text("no picture")
    (folder / "dogs" / "empty.png").write_bytes(b"")
    out = tmp_path / "codes.npz"
    assert tokenize.main(["encode", str(folder), str(out), f"--tokenizer={saved}", "--size=16", "--batch=4"]) == 0
    text = capsys.readouterr()
    assert text.out == f"{out}: 9 x 8 x 8 codes, 2 of 11 files skipped\n"
    for name in ("cats/broken.jpg", "dogs/empty.png"):
        assert f"fvq_jax: skipped '{folder}/{name}': not a JPEG, PNG, WebP, GIF or BMP file" in text.err
    assert "11/11" in text.err
    with np.load(out) as file:
        codes, names = file["codes"], file["names"].tolist()
    assert codes.dtype == np.int32
    files = sorted(folder.rglob("*.*"), key=lambda path: path.relative_to(folder).parts)
    good = [path for path in files if path.name not in ("broken.jpg", "empty.png")]
    assert names == [path.relative_to(folder).as_posix() for path in good]
    tok = Tokenizer.from_pretrained(saved)
    np.testing.assert_array_equal(codes, tok.encode(np.stack([resize_center(open_image(path), 16) for path in good])))

    back = tmp_path / "back"
    assert tokenize.main(["decode", str(out), str(back), f"--tokenizer={saved}", "--batch=4"]) == 0
    text = capsys.readouterr()
    assert text.out == f"{back}: 9 pictures\n"
    assert "9/9" in text.err
    pictures = (tok.decode(codes) + 1) * 127.5
    for name, picture in zip(names, pictures, strict=True):
        path = (back / name).with_suffix(".png")
        np.testing.assert_allclose(np.asarray(Image.open(path)), picture, atol=0.501)  # rounded, not cut off


def test_names_that_differ_in_their_ending_stay_apart(saved, tmp_path):
    codes = np.zeros((2, 4, 4), np.int32)
    np.savez(tmp_path / "c.npz", codes=codes, names=np.array(["x/a.jpg", "x/a.png"]))
    assert tokenize.main(["decode", str(tmp_path / "c.npz"), str(tmp_path / "out"), f"--tokenizer={saved}"]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "x").iterdir()) == ["a.png", "a.png.png"]


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "."])
def test_names_that_lead_out_of_the_folder_are_refused(name, saved, tmp_path, capsys):
    np.savez(tmp_path / "c.npz", codes=np.zeros((1, 4, 4), np.int32), names=np.array([name]))
    assert tokenize.main(["decode", str(tmp_path / "c.npz"), str(tmp_path / "out"), f"--tokenizer={saved}"]) == 2
    assert f"fvq_jax: the name {name!r} in the file of codes is not a path below a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.npz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size=15"], "--size 15: images of 15 x 15 pixels do not fit the down-sampling of 2"),
        (["--size=16", "--batch=0"], "--batch must be at least 1, not 0"),
        (["--size=16", "--l2_norm=true"], "l2_norm=True contradicts"),
    ],
)
def test_bad_options_exit_2_with_one_line(options, message, saved, folder, tmp_path, capsys):
    args = ["encode", str(folder), str(tmp_path / "x.npz"), f"--tokenizer={saved}", *options]
    assert tokenize.main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x.npz").exists()


def test_a_folder_without_readable_pictures_leaves_no_file(saved, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    args = ["encode", str(tmp_path / "in"), str(tmp_path / "x.npz"), f"--tokenizer={saved}", "--size=16"]
    assert tokenize.main(args) == 2
    assert "holds no file that ends in" in capsys.readouterr().err
    (tmp_path / "in" / "a.png").write_text("")
    assert tokenize.main(args) == 2
    assert "none of the 1 files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(saved, tmp_path, monkeypatch):
    """One picture under many names, so that only what is kept per picture could add up."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr(tokenize, "open_image", lambda name: picture)
    peaks = []
    for count in (32, 320):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.png").touch()
        args = [
            "encode",
            str(folder),
            str(tmp_path / f"{count}.npz"),
            f"--tokenizer={saved}",
            "--size=32",
            "--batch=16",
        ]
        assert tokenize.main(args) == 0  # compiles, imports
        tracemalloc.start()
        assert tokenize.main(args) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 288 * 3072 / 2, peaks  # the crops alone are 288 x 3072 bytes


def extract(saved, data, out, *options):
    args = [f"--tokenizer={saved}", f"--data={data}", f"--out={out}", "--size=16", *options]
    return tokenize.main(["extract", *args])


def test_a_folder_becomes_codes_of_ten_crops_to_train_on(saved, folder, tmp_path, capsys):
    (folder / "cats" / "broken.jpg").write_text("no picture")
    out = tmp_path / "codes"
    assert extract(saved, folder, out, "--crops=ten", "--scales=1.2,1.1", "--batch=20") == 0
    text = capsys.readouterr()
    said = (
        "9 pictures of 3 classes, each 2 x 10 crops of 8 x 8 codes, in 1 shards, 0.00 GB, 1 left out, 1 shards written"
    )
    assert text.out == f"{out}: {said} now\n"
    assert "fvq_jax: left out 'cats/broken.jpg': not a JPEG, PNG" in text.err
    assert "10/10" in text.err
    assert "images/s" in text.err
    source, tok = open_codes(out), Tokenizer.from_pretrained(saved)
    info = source.info
    assert (info.tokenizer, info.vocab, info.grid, info.size) == (tok.fingerprint, 64, (8, 8), 16)
    assert (info.class_names, info.condition) == (("cats", "dogs", "more"), "none")
    assert json.loads((out / "manifest.json").read_text())["tokenizer_path"] == str(saved)
    cropping = Cropping.parse("ten", "1.2,1.1", 16)
    crops = cropping.cut(open_image(folder / "dogs" / "a.webp"), 0)
    (index,) = [index for index in range(len(source)) if source.relative_name(index) == "dogs/a.webp"]
    np.testing.assert_array_equal(source[index]["codes"], tok.encode(crops.reshape(-1, 16, 16, 3)).reshape(2, 10, 8, 8))
    assert source[index]["label"] == 1
    assert extract(saved, folder, out, "--crops=ten", "--scales=1.2,1.1", "--batch=20") == 0
    assert "0 shards written now" in capsys.readouterr().out


def test_a_tokenizer_may_be_a_repository_whose_name_is_kept(saved, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = []
    monkeypatch.setattr("fvq_jax.inference.location.download", lambda name: wanted.append(name) or saved)
    assert extract("org/name@v1", folder, tmp_path / "codes", "--crops=center") == 0
    assert wanted == [("org/name", "v1")]
    assert json.loads((tmp_path / "codes" / "manifest.json").read_text())["tokenizer_path"] == "org/name@v1"


@pytest.mark.slow
def test_codes_of_prepared_pictures_photographs_and_data_sets(saved, folder, tmp_path):
    assert prepare(folder, tmp_path / "prepared") == 0
    assert extract(saved, tmp_path / "prepared", tmp_path / "a") == 0
    assert [open_codes(tmp_path / "a").relative_name(index) for index in range(2)] == ["cats/a.png", "cats/b.jpg"]
    write_data_set(tmp_path / "tfds", "tiny_pictures", {"train": 3, "validation": 2})
    tfds.core.add_data_dir(tmp_path / "tfds")
    for number, (data, options, count) in enumerate(
        [
            ("tfds:tiny_pictures", [], 3),
            ("tfds:tiny_pictures:1.2.0", ["--split=eval"], 2),
            ("tfds:tiny_pictures:1.2.0:train[1:]", [], 2),
            ("tfds:tiny_pictures:validation", [], 2),
        ]
    ):
        assert extract(saved, data, tmp_path / f"tfds{number}", *options) == 0
        source = open_codes(tmp_path / f"tfds{number}")
        assert len(source) == count
        assert source.info.class_names == ("ant", "bee", "cat")


def test_photographs_are_cropped_at_random_without_resizing(saved, tmp_path, monkeypatch):
    given = []

    def note(source, cropping, *others):
        given.append((source, cropping))
        return "done"

    monkeypatch.setattr(tokenize, "extract", note)
    assert extract(saved, "photos", tmp_path / "out", "--crops=random:4", "--seed=3") == 0
    assert extract(saved, "photos", tmp_path / "out", "--split=eval") == 0
    (train, random), (held_out, centre) = given
    assert train[0]["image"].shape == (32, 32, 3)
    assert held_out[0]["image"].shape == (16, 16, 3)
    assert random == Cropping("random", 4, (None,), 16, 3)
    assert centre == Cropping("center", 1, (1.0,), 16)


@pytest.mark.slow
def test_a_bridge_with_classes_is_given_the_label_or_no_class(folder, tmp_path, capsys):
    """The folder has three classes."""
    tok = Tokenizer(random_tokenizer(bridge="dit-XS/2-c3"))
    tok.save_pretrained(tmp_path / "tok")
    plain = Cropping.parse("center", None, 16).cut(open_image(folder / "dogs" / "a.webp"), 2)[0]
    found = {}
    for condition, labels in (("label", np.array([1])), ("null", "null")):
        out = tmp_path / condition
        assert extract(tmp_path / "tok", folder, out, f"--condition={condition}") == 0
        source = open_codes(out)
        assert source.info.condition == condition
        assert source.relative_name(2) == "dogs/a.webp"
        found[condition] = source[2]["codes"][0]
        np.testing.assert_array_equal(found[condition], tok.encode(plain, labels))
    assert not np.array_equal(found["label"], found["null"])
    capsys.readouterr()
    assert extract(tmp_path / "tok", folder, tmp_path / "label", "--condition=null") == 2
    assert "was begun with --condition label, not null" in capsys.readouterr().err
    assert extract(tmp_path / "tok", folder, tmp_path / "other") == 2
    assert "give --condition=label (each picture with its own) or --condition=null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size=15"], "--size 15: images of 15 x 15 pixels do not fit the down-sampling of 2"),
        (["--size=0"], "--size 0 cannot be"),
        (["--batch=0"], "--batch and --shard-size must be at least 1"),
        (["--crops=nine"], "--crops=nine cannot be: use center, ten, or random:N"),
        (["--scales=0.5"], "--scales=0.5 cannot be"),
        (["--split=eval"], "--split=eval is for photos and tfds: give --data the folder of that split"),
        (["--condition=null"], "--condition=null is for a tokenizer whose bridge has classes"),
        (["--data=nowhere"], "image folder 'nowhere' does not exist"),
        (["--data=tfds:unheard_of"], "data set 'unheard_of' is neither known"),
        (["--l2_norm=true"], "l2_norm=True contradicts"),
    ],
)
def test_bad_options_of_extract_exit_2_with_one_line(options, message, saved, folder, tmp_path, capsys):
    assert extract(saved, folder, tmp_path / "out", *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupted_extraction_says_so(saved, folder, tmp_path, capsys, monkeypatch):
    def interrupted(source, cropping, encoder, out, work, interrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        return "" if interrupt.signal else "done"

    monkeypatch.setattr(tokenize, "extract", interrupted)
    assert extract(saved, folder, tmp_path / "out") == 75
    assert capsys.readouterr().err == "fvq_jax: interrupted by SIGTERM: start me again\n"


@pytest.mark.slow
def test_two_processes_extract_the_codes_of_one(saved, folder, tmp_path):
    assert extract(saved, folder, tmp_path / "one", "--shard-size=2") == 0
    port, command = free_port(), ["-m", "fvq_jax.tokenize", "extract", f"--tokenizer={saved}", f"--data={folder}"]
    command += [f"--out={tmp_path / 'two'}", "--size=16", "--shard-size=2", "--distributed"]
    hosts = [start_host(index, 2, port, *command) for index in range(2)]
    said = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert "9 pictures of 3 classes" in said[0][0]
    assert "pictures" not in said[1][0]
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_it_does_not_hide_the_standard_module():
    code = "import tokenize, sys; assert tokenize.__file__.startswith(sys.base_prefix), tokenize.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "fvq_jax.tokenize", "encode"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "fvq_jax: the following arguments are required: FOLDER, CODES.npz, --tokenizer, --size"
    )
    assert importlib.import_module("tokenize") is not tokenize


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "classes"
    Tokenizer(random_tokenizer(bridge="dit-XS/2-c5")).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["3", "null"])
def test_all_pictures_are_given_one_class(condition, with_classes, folder, tmp_path):
    options = [f"--tokenizer={with_classes}", f"--condition={condition}"]
    assert tokenize.main(["encode", str(folder), str(tmp_path / "c.npz"), "--size=16", "--batch=4", *options]) == 0
    tok, labels = Tokenizer.from_pretrained(with_classes), "null" if condition == "null" else np.full(9, 3)
    files = sorted(folder.rglob("*.*"), key=lambda path: path.relative_to(folder).parts)
    with np.load(tmp_path / "c.npz") as file:
        codes, names = file["codes"], file["names"].tolist()
    crops = np.stack([resize_center(open_image(path), 16) for path in files])
    np.testing.assert_array_equal(codes, tok.encode(crops, labels))
    assert tokenize.main(["decode", str(tmp_path / "c.npz"), str(tmp_path / "back"), *options]) == 0
    for name, picture in zip(names, (tok.decode(codes, labels) + 1) * 127.5, strict=True):
        path = (tmp_path / "back" / name).with_suffix(".png")
        np.testing.assert_allclose(np.asarray(Image.open(path)), picture, atol=0.501)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ([], "give --condition, a label in 0..4 for all pictures or null for no class"),
        (["--condition=5"], "name one by a label in 0..4"),
    ],
)
def test_a_class_is_needed_before_pictures_are_read(option, message, with_classes, folder, tmp_path, capsys):
    args = ["encode", str(folder), str(tmp_path / "c.npz"), f"--tokenizer={with_classes}", "--size=16", *option]
    assert tokenize.main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_condition_without_classes_is_refused(saved, folder, tmp_path, capsys):
    args = ["encode", str(folder), str(tmp_path / "c.npz"), f"--tokenizer={saved}", "--size=16"]
    assert tokenize.main([*args, "--condition=null"]) == 2
    assert "has a single table and no classes: leave condition out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tokenize.main([*args, "--condition=label"])
    assert "must be a label such as 7, or null, not 'label'" in capsys.readouterr().err


def saved_with(quantizer, path):
    net = random_tokenizer(bridge="none").net.clone(quantizer=quantizer)
    params = jax.jit(net.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    Tokenizer(SavedTokenizer(net, jax.device_get(params))).save_pretrained(path)
    return path


PLAIN = {"codebook_size": 64, "code_dim": 8, "bridge": "none", "init_std": 1.0}


@pytest.mark.slow
def test_codes_with_levels_are_written_and_read(folder, tmp_path, capsys):
    path = saved_with(ResidualQuantizer(**PLAIN, depth=3), tmp_path / "tokenizer")
    assert tokenize.main(["encode", str(folder), str(tmp_path / "c.npz"), f"--tokenizer={path}", "--size=16"]) == 0
    with np.load(tmp_path / "c.npz") as file:
        codes, names = file["codes"], file["names"]
    assert codes.shape == (len(names), 8, 8, 3)
    assert f"{len(names)} x 8 x 8 x 3 codes" in capsys.readouterr().out
    assert tokenize.main(["decode", str(tmp_path / "c.npz"), str(tmp_path / "out"), f"--tokenizer={path}"]) == 0
    tokenizer = Tokenizer.from_pretrained(path)
    first = np.asarray(Image.open(tmp_path / "out" / pathlib.PurePath(str(names[0])).with_suffix(".png")))
    np.testing.assert_array_equal(first, np.asarray(to_uint8(tokenizer.decode(codes[:1])))[0])


@pytest.mark.slow
def test_scales_take_one_size_of_pictures(folder, tmp_path, capsys):
    path = saved_with(MultiScaleQuantizer(**PLAIN, scales=(1, 2, 4), phi_count=2), tmp_path / "tokenizer")
    for command in (
        ["encode", str(folder), str(tmp_path / "c.npz")],
        ["extract", f"--data={folder}", f"--out={tmp_path}/e"],
    ):
        assert tokenize.main([*command, f"--tokenizer={path}", "--size=16"]) == 2
        err = capsys.readouterr().err
        assert "--size 16: this tokenizer takes images of 8 x 8 pixels only, not of 16 x 16" in err
        assert err.count("\n") == 1
    assert extract(path, folder, tmp_path / "e", "--size=8") == 0
    assert "codes with levels or scales cannot train the generator" in capsys.readouterr().err
