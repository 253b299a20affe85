import importlib
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fvq_jax import tokenize
from fvq_jax.data.decode import open_image
from fvq_jax.data.transforms import resize_center
from fvq_jax.inference.tokenizer import Tokenizer
from tests.helpers.random_tokenizer import random_tokenizer

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


def test_a_folder_becomes_codes_and_pictures_again(saved, folder, tmp_path, capsys):
    (folder / "cats" / "broken.jpg").write_text("no picture")
    (folder / "dogs" / "empty.png").write_bytes(b"")
    out = tmp_path / "codes.npz"
    assert tokenize.main(["encode", str(folder), str(out), f"--tokenizer={saved}", "--size=16", "--batch=4"]) == 0
    text = capsys.readouterr()
    assert text.out == f"{out}: 9 x 8 x 8 codes, 2 of 11 files skipped\n"
    for name in ("cats/broken.jpg", "dogs/empty.png"):
        assert f"fvq_jax: skipped '{folder}/{name}': not a readable picture" in text.err
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
        (["--size=15"], "--size 15 is not divisible by the down-sampling of 2"),
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
