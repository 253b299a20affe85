import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from fvq_jax import sample
from fvq_jax.data.sample_folder import SampleFolder
from fvq_jax.inference.generator import Generator
from fvq_jax.inference.saved_generator import Provenance
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.ops.pixels import to_uint8
from fvq_jax.ops.resize import resize_bicubic
from fvq_jax.report.pictures import sample_grid
from tests.helpers.random_generator import random_generator
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.two_hosts import on_two_hosts

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("otter", "tench", "goldfish", "hen", "robin", "newt", "turtle", "gecko", "cobra", "scorpion")


@pytest.fixture(scope="module")
def models():
    tokenizer = Tokenizer(random_tokenizer())
    known = Provenance(tokenizer.fingerprint, "none", 8, NAMES)
    return Generator(random_generator(provenance=known), tokenizer)


@pytest.fixture(scope="module")
def paths(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models.save_pretrained(folder / "gen")
    models.tokenizer.save_pretrained(folder / "tok")
    return [f"--generator={folder / 'gen'}", f"--tokenizer={folder / 'tok'}"]


@pytest.fixture
def run(paths, tmp_path, capsys):
    """Runs the program; its result line."""

    def call(*options, out="out"):
        assert sample.main([*paths, f"--out={tmp_path / out}", *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_classes_in_equal_shares_mixed_with_all_files(models, run, tmp_path):
    result = run("--classes=otter,3,turtle", "--per-class=7", "--batch=8", "--npz", "--png", "--seed=5")
    assert (result["samples"], result["drawn_now"], result["condition"]) == (21, 21, "none")
    assert result["samples_per_second"] == pytest.approx(21 / result["seconds"], rel=0.01)
    out = tmp_path / "out"
    assert result["files"] == [str(out / name) for name in ("grid.png", "labels.npy", "samples.npz", "png")]
    labels = np.load(out / "labels.npy")
    assert np.bincount(labels).tolist() == [7, 0, 0, 7, 0, 0, 7]
    assert (np.sort(labels) != labels).any()
    expected = models.sample(labels, seed=5)
    with np.load(out / "samples.npz") as file:
        images = file["arr_0"]
        assert file.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_1"], np.load(out / "labels.npy"))
    assert (images.dtype, images.shape) == (np.uint8, (21, 8, 8, 3))
    np.testing.assert_array_equal(images, to_uint8(expected))
    for number in (0, 20):
        with Image.open(out / "png" / f"{number:02}_class_{labels[number]}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), images[number])
    assert len(list((out / "png").iterdir())) == 21
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 5 * 8
    assert not (out / "parts").exists()
    # Started again, nothing is drawn; for another file everything is.
    assert run("--classes=otter,3,turtle", "--per-class=7", "--batch=4", "--npz", "--seed=5") == result
    (out / "samples.npz").unlink()
    assert run("--classes=otter,3,turtle", "--per-class=7", "--batch=8", "--npz", "--seed=5")["drawn_now"] == 21
    with np.load(out / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], images)


def test_killed_in_the_middle_it_goes_on_with_the_same_samples(run, tmp_path, monkeypatch):
    options = ("--random=20", "--guidance=1", "--npz")
    whole = run(*options, "--batch=8", out="whole")
    assert whole["drawn_now"] == 20

    class Killed(BaseException):
        pass

    add = SampleFolder.add

    def killed(folder, images):
        if folder.done >= 8:
            raise Killed
        add(folder, images)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "add", killed)
        with pytest.raises(Killed):
            run(*options, "--batch=8")
    assert not (tmp_path / "out" / "samples.npz").exists()
    assert run(*options, "--batch=16")["drawn_now"] == 12
    files = [np.load(tmp_path / out / "samples.npz")["arr_0"] for out in ("whole", "out")]
    np.testing.assert_array_equal(*files)
    labels = np.load(tmp_path / "out" / "labels.npy")
    np.testing.assert_array_equal(labels, np.load(tmp_path / "whole" / "labels.npy"))
    assert set(labels) <= set(range(10))
    assert len(set(labels)) > 4


@pytest.mark.slow
def test_after_sigkill_another_process_makes_the_same_files(paths, run, tmp_path):
    options = ["--random=160", "--guidance=1", "--batch=4", "--npz"]
    command = [sys.executable, "-m", "fvq_jax.sample", *paths, f"--out={tmp_path / 'out'}", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(list(tmp_path.glob("out/parts/*.npy"))) < 2:
            time.sleep(0.002)
        process.kill()
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, said
    assert 0 < run(*options)["drawn_now"] <= 152
    assert run(*options, out="whole")["drawn_now"] == 160
    for name in ("samples.npz", "labels.npy", "grid.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_pixels_are_resized_and_rounded_as_asked(models, run, tmp_path):
    run("--random=4", "--guidance=1", "--resize=6", "--rounding=truncate", "--npz")
    images = models.sample(np.load(tmp_path / "out" / "labels.npy"), guidance=1.0)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], to_uint8(resize_bicubic(images, 6, 6), "truncate"))


def test_options_of_drawing_reach_the_generator(models, run, tmp_path):
    drawn = {"guidance": 3.0, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "schedule": "cosine", "power": 2.0}
    drawn["interval"] = 9
    run("--random=4", "--npz", *[f"--{name}={value}" for name, value in drawn.items()])
    images = models.sample(np.load(tmp_path / "out" / "labels.npy"), **drawn)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], to_uint8(images))


def test_several_processes_share_the_work_and_the_first_writes(paths, run, tmp_path, monkeypatch):
    options = ["--random=11", "--guidance=1", "--npz", "--batch=6"]
    run(*options, out="one")
    args = sample._parse([*paths, f"--out={tmp_path / 'two'}", *options])
    counts = [[], []]
    draw = Generator.sample_codes

    def counted(generator, labels, *rest, **more):
        counts[sample.jax.process_index()].append(len(labels))
        return draw(generator, labels, *rest, **more)

    monkeypatch.setattr(Generator, "sample_codes", counted)
    first, second = on_two_hosts(monkeypatch, lambda index: sample.sample(args))
    assert (first["samples"], second) == (11, {})
    assert counts == [[3, 3]] * 2
    files = [np.load(tmp_path / out / "samples.npz")["arr_0"] for out in ("one", "two")]
    np.testing.assert_array_equal(*files)


def test_a_row_of_the_grid_is_a_class(run, tmp_path):
    run("--classes=4,2", "--per-class=3", "--guidance=1", "--batch=4", "--npz")
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    labels = np.load(tmp_path / "out" / "labels.npy")
    rows = np.concatenate([images[labels == label] for label in (2, 4)])
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid), sample_grid(rows, columns=3))


def test_without_a_row_for_each_class_the_grid_is_a_square(run, tmp_path):
    run("--random=9", "--guidance=1", "--npz")
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    order = np.argsort(np.load(tmp_path / "out" / "labels.npy"), kind="stable")
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid), sample_grid(images[order], columns=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--random=4", "--batch=0"], "--batch must be at least 1, not 0"),
        (["--random=0"], "--random must be 1 to 10,000,000, not 0"),
        (["--per-class=0"], "--per-class must be 1 to 10,000,000, not 0"),
        (["--random=4", "--resize=0"], "--resize must be 1 to 16,384, not 0"),
        (["--random=4", "--seed=-1"], "--seed must be in 0..4294967295, not -1"),
        (["--random=4", "--top_p=2"], "top_p must be above 0 and at most 1"),
        (["--random=4", "--classes=1,10"], "--classes: there is no class 10: the generator has 0..9"),
        (
            ["--random=4", "--classes=ottre"],
            "--classes: 'ottre' is no class of the generator; it has no class of that ",
        ),
        (["--random=4", "--condition=label"], "is for a tokenizer with a table per class"),
        (["--random=4", "--heads=2"], "heads=2 contradicts"),
        (["--random=4", "--use_ema=true"], "is no training workdir, so use_ema does nothing"),
    ],
)
def test_bad_options_are_one_line_and_leave_no_file(options, message, paths, tmp_path, capsys):
    assert sample.main([*paths, f"--out={tmp_path / 'out'}", *options]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --per-class --random is required"),
        (["--random=4", "--per-class=1"], "not allowed with argument"),
        (["--random=4", "--grid=4"], "must be rows x columns such as 16x16, not '4'"),
        (["--random=4", "--schedule=sine"], "invalid choice: 'sine'"),
    ],
)
def test_wrong_command_lines_are_one_line(options, message, paths, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        sample.main([*paths, f"--out={tmp_path / 'out'}", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_other_settings_need_another_folder(run, paths, tmp_path, capsys):
    run("--random=2", "--guidance=1")
    assert (tmp_path / "out" / "parts").exists()  # nothing else holds the samples
    assert sample.main([*paths, f"--out={tmp_path / 'out'}", "--random=2", "--guidance=1.5"]) == 2
    assert "made differently: guidance is 1.0 there and 1.5 here; use another folder" in capsys.readouterr().err
