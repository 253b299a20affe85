import argparse
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fvq_jax import evaluate
from fvq_jax.evals import generation
from fvq_jax.evals import reference as reference_module
from fvq_jax.evals.frechet import frechet_distance
from fvq_jax.evals.precision_recall import precision_recall
from fvq_jax.evaluate import samples as samples_module
from fvq_jax.evaluate.options import parse
from fvq_jax.inference.generator import Generator
from fvq_jax.inference.saved_generator import Provenance, SavedGenerator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.frozen.inception import CLASSES
from fvq_jax.models.gpt import GPT
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.two_hosts import on_two_hosts

pytestmark = pytest.mark.usefixtures("no_drawing")

POOLED, SPATIAL, BLOCK, SIZE = 20, 12, 16, 8


@functools.cache
def projection(pixels):
    rng = np.random.default_rng(0)
    sizes = {str(POOLED): POOLED, "spatial": SPATIAL, "logits_unbiased": CLASSES}
    return {name: rng.normal(size=(pixels, size)) for name, size in sizes.items()}


def inception(images):
    """Stands in for InceptionV3, which is tested by itself."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    return {name: (flat @ matrix).astype(np.float32) for name, matrix in projection(flat.shape[1]).items()}


@pytest.fixture(autouse=True)
def few_features(monkeypatch):
    for name, value in {"POOLED_FEATURES": POOLED, "SPATIAL_FEATURES": SPATIAL, "SCORE_BLOCK": BLOCK}.items():
        monkeypatch.setattr(generation, name, value)
    monkeypatch.setattr(reference_module, "FEATURES", (POOLED,))
    monkeypatch.setattr(reference_module, "SPATIAL_FEATURES", SPATIAL)
    monkeypatch.setattr(samples_module, "load_inception", lambda path, spatial: inception)


def pictures(n, seed, low=0, size=SIZE):
    return np.random.default_rng(seed).integers(low, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """real.npz, a.npz and b.npz with labels, the pictures of a.npz as a folder, and statistics with pictures."""
    folder = tmp_path_factory.mktemp("samples")
    np.savez(folder / "real.npz", pictures(41, 0))
    for seed, name in ((1, "a"), (2, "b")):
        np.savez(folder / f"{name}.npz", pictures(37, seed, 40 * seed), np.arange(37) % 3)
    (folder / "a").mkdir()
    for index, image in enumerate(pictures(37, 1, 40)):
        Image.fromarray(image).save(folder / "a" / f"{index:03}.png")
    rng = np.random.default_rng(5)
    statistics = {"mu": rng.normal(size=POOLED), "sigma": np.eye(POOLED)}
    statistics |= {"mu_s": rng.normal(size=SPATIAL), "sigma_s": np.eye(SPATIAL)}
    np.savez(folder / "adm.npz", arr_0=pictures(41, 0), **statistics)
    np.savez(folder / "statistics.npz", **statistics)
    return folder


def run(capsys, *options, code=0):
    found = evaluate.main([str(option) for option in ("--inception=weights.pth", "--batch=8", *options)])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return json.loads(captured.out) if code == 0 else captured.err


def test_stored_samples(files, tmp_path, capsys):
    result = run(capsys, f"--samples={files / 'a.npz'}", f"--reference={files / 'real.npz'}", f"--out={tmp_path}")
    a, b = inception(pictures(41, 0)), inception(pictures(37, 1, 40))
    key = str(POOLED)
    assert result["fid"] == pytest.approx(frechet_distance(a[key], b[key]), rel=1e-6)
    assert result["sfid"] == pytest.approx(frechet_distance(a["spatial"], b["spatial"]), rel=1e-6)
    assert (result["precision"], result["recall"]) == precision_recall(a[key], b[key])
    assert result["inception_score"] > 1
    assert result["inception_score_std"] > 0
    assert (result["samples"], result["reference_images"]) == (37, 41)
    assert result["protocol"] == "adm, float32 distances, uint8 stored"
    assert result["not_computed"] == {}
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"{result['fid']:.2f}" in page
    assert "<span>class 2</span>" in page
    assert "note: a.npz" in result  # 37 pictures are no whole number of blocks


def test_a_folder_scores_as_its_file_does(files, tmp_path, capsys):
    options = [f"--reference={files / 'real.npz'}", f"--out={tmp_path}"]
    of_file = run(capsys, f"--samples={files / 'a.npz'}", *options)
    of_folder = run(capsys, f"--samples={files / 'a'}", *options)
    for name in ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "samples"):
        assert of_folder[name] == pytest.approx(of_file[name], rel=1e-9)


def test_several_sets_and_the_best_of_them(files, tmp_path, capsys):
    options = [f"--reference={files / 'real.npz'}", f"--out={tmp_path}", "--guidance=1,2.5", "--distances=adm"]
    result = run(capsys, f"--samples={files / 'b.npz'},{files / 'a.npz'}", *options)
    assert [one["name"] for one in result["sets"]] == ["b.npz", "a.npz"]
    assert [one["guidance"] for one in result["sets"]] == [1, 2.5]
    assert result["best"] == "a.npz"
    assert result["fid"] == result["sets"][1]["fid"] < result["sets"][0]["fid"]
    assert result["protocol"] == "adm, adm distances, uint8 stored"
    assert "<h2>Guidance</h2>" in (tmp_path / "report" / "index.html").read_text()


def test_reference_files_of_adm(files, tmp_path, capsys):
    """Statistics come from the file, and its pictures serve precision and recall; without them there are neither."""
    options = [f"--samples={files / 'a.npz'}", f"--out={tmp_path}"]
    real = run(capsys, *options, f"--reference={files / 'real.npz'}")
    whole = run(capsys, *options, f"--reference={files / 'adm.npz'}")
    with np.load(files / "adm.npz") as arrays:
        expected = frechet_distance((arrays["mu"], arrays["sigma"]), inception(pictures(37, 1, 40))[str(POOLED)])
    assert whole["fid"] == pytest.approx(expected, rel=1e-6)
    assert (whole["precision"], whole["recall"]) == (real["precision"], real["recall"])
    assert whole["reference_images"] == 41
    statistics = run(capsys, *options, f"--reference={files / 'statistics.npz'}")
    assert statistics["fid"] == whole["fid"]
    assert statistics["reference_images"] is None
    assert set(statistics["not_computed"]) == {"precision", "recall"}
    assert "they need its pictures (arr_0)" in statistics["not_computed"]["recall"]


def test_photographs_are_a_reference(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", pictures(9, 1, size=32))
    result = run(capsys, f"--samples={tmp_path / 'a.npz'}", "--reference=photos", "--batch=512", f"--out={tmp_path}")
    assert result["reference_images"] == 2048


def test_class_order_is_warned_of(tmp_path, files, capsys):
    np.savez(tmp_path / "a.npz", pictures(32, 1), np.arange(32) // 16)
    result = run(
        capsys, f"--samples={tmp_path / 'a.npz'}", f"--reference={files / 'real.npz'}", f"--out={tmp_path / 'out'}"
    )
    assert "order of their classes" in result["warning: a.npz"]


def generator(class_dropout=0.1):
    net = GPT(vocab=64, classes=3, grid=(4, 4), layers=1, width=16, heads=2, class_dropout=class_dropout)
    labels, codes = jnp.zeros(1, jnp.int32), jnp.zeros((1, 16), jnp.int32)
    params = net.init(jax.random.key(0), labels, codes)["params"]
    params["output"] = np.random.default_rng(0).normal(size=params["output"].shape).astype(np.float32)
    return Generator(SavedGenerator(net, params, Provenance()), Tokenizer(random_tokenizer()))


@pytest.fixture
def drawn(monkeypatch):
    made = generator()
    monkeypatch.setattr(samples_module.Generator, "from_pretrained", lambda path, tokenizer: made)
    return made


@pytest.mark.slow
def test_samples_are_drawn_while_they_are_scored(drawn, files, tmp_path, capsys):
    options = ["--generator=gen", "--tokenizer=tok", f"--reference={files / 'real.npz'}", f"--out={tmp_path / 'x'}"]
    options += ["--count=22", "--guidance=1,3", "--seed=7", "--top_k=9", "--rounding=truncate"]
    result = run(capsys, *options)
    images = drawn.sample(np.arange(22) % 3, 7, guidance=3.0, top_k=9)
    stored = np.floor(np.clip(127.5 * images + 128, 0, 255)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", stored)
    again = run(capsys, f"--samples={tmp_path / 'a.npz'}", options[2], f"--out={tmp_path / 'y'}")
    (of_three,) = (one for one in result["sets"] if one["guidance"] == 3)
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert of_three[name] == pytest.approx(again[name], rel=1e-5)
    assert result["protocol"] == "adm, float32 distances, uint8 truncate"
    assert (result["seed"], result["top_k"], result["labels"]) == (7, 9, "image i is of class i modulo 3")
    assert result["condition"] == "none"
    assert result["sets"][0]["fid"] != of_three["fid"]


@pytest.mark.slow
def test_two_hosts_find_what_one_finds(files, tmp_path, monkeypatch):
    def arguments(out):
        options = [f"--samples={files / 'a.npz'},{files / 'a'}", f"--reference={files / 'real.npz'}", f"--out={out}"]
        return parse([*options, "--inception=weights.pth", "--batch=8"])

    reports = {}
    monkeypatch.setattr(
        samples_module, "write_generator_report", lambda folder, report: reports.update({folder.name: report})
    )
    alone = evaluate.evaluate_samples(arguments(tmp_path / "one"))
    found = on_two_hosts(monkeypatch, lambda index: evaluate.evaluate_samples(arguments(tmp_path / f"host{index}")))
    assert found[1] == {}
    for name, value in alone.items():
        if isinstance(value, float):
            assert found[0][name] == pytest.approx(value, rel=1e-9), name
    assert set(reports) == {"one", "host0"}
    for one, other in zip(reports["one"].samples, reports["host0"].samples, strict=True):
        np.testing.assert_array_equal(one.pictures, other.pictures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples={files}/a.npz"], "--reference is missing"),
        (
            ["--samples={files}/a.npz", "--reference={files}/small.npz"],
            r"a.npz has pictures of 8 x 8 pixels and .*small",
        ),
        (["--samples={files}/a.npz", "--reference={files}/few.npz"], "at least 4 reference pictures .*, not 3"),
        (["--samples={files}/few.npz", "--reference={files}/real.npz"], "at least 4 samples in few.npz .*, not 3"),
        (["--samples={files}/floats.npz", "--reference={files}/real.npz"], r"arr_0 must be uint8 \[N, H, W, 3\]"),
        (["--samples={files}/none.npz", "--reference={files}/real.npz"], "cannot read pictures from .*none.npz"),
        (["--samples={files}/a.npz", "--reference={files}/none.npz"], "cannot read .*none.npz"),
        (["--samples={files}/a.npz", "--reference={files}/none"], "does not exist or is not a folder"),
        (["--samples=,", "--reference={files}/real.npz"], "--samples is empty"),
        (["--samples={files}/a.npz", "--reference={files}/real.npz", "--guidance=1,2"], "2 values for 1 sets"),
        (["--samples={files}/a.npz", "--reference={files}/real.npz", "--guidance=x"], "must be numbers such as"),
        (["--samples={files}/a.npz", "--reference={files}/real.npz", "--batch=0"], "--batch must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_one_line(options, message, files, tmp_path, capsys):
    np.savez(files / "small.npz", pictures(9, 0, size=4))
    np.savez(files / "few.npz", pictures(3, 0))
    np.savez(files / "floats.npz", np.zeros((9, 8, 8, 3), np.float32))
    error = run(capsys, *(option.format(files=files) for option in options), f"--out={tmp_path}", code=2)
    (line,) = [line for line in error.splitlines() if line.startswith("fvq_jax: ")]
    assert re.search(message, line), line


def test_without_weights_nothing_is_scored(files, tmp_path, capsys):
    options = [f"--samples={files / 'a.npz'}", f"--reference={files / 'real.npz'}", f"--out={tmp_path}"]
    assert evaluate.main(options) == 2
    assert "--inception is missing: get pt_inception-2015-12-05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generator=g", "--samples=a.npz"], "--generator needs --tokenizer=PATH"),
        (["--samples=a.npz", "--data=photos"], "--data says nothing about the scoring of stored samples"),
        (["--samples=a.npz", "--rounding=truncate"], "--rounding says nothing about the scoring of stored samples"),
        (["--tokenizer=t", "--reference=photos"], "--reference says nothing about the scoring of a tokenizer"),
        (["--tokenizer=t", "--generator=g", "--crops=3"], "--crops says nothing about the scoring of a generator"),
        (["--samples=a.npz", "--tokenizer=t"], "not allowed with argument"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([*options, "--out=x"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_workdir_of_a_generator_is_told_from_that_of_a_tokenizer(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"task": "generator", "data": {}}))
    assert evaluate.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert "is the workdir of a generator, not of a tokenizer: score its samples" in capsys.readouterr().err


def test_guidance_needs_a_class_for_no_class(files, tmp_path, monkeypatch, capsys):
    made = generator(class_dropout=0.0)
    monkeypatch.setattr(samples_module.Generator, "from_pretrained", lambda path, tokenizer: made)
    options = ["--generator=g", "--tokenizer=t", f"--reference={files / 'real.npz'}", f"--out={tmp_path}"]
    assert "was trained without class dropout" in run(capsys, *options, "--guidance=1.5", code=2)
    assert "--count must be at least 1, not 0" in run(capsys, *options, "--guidance=1", "--count=0", code=2)
    error = run(capsys, *options, "--guidance=1", "--condition=null", code=2)
    assert "condition='null' is for a tokenizer with a table per class" in error


def test_the_parser_lists_every_option_that_it_may_refuse():
    parser = argparse.ArgumentParser()
    samples_module.add_arguments(parser)
    known = {action.dest for action in parser._actions}
    assert known >= {*samples_module.OF_SAMPLES, *samples_module.OF_DRAWING}
