"""Samples that are drawn and scored while a generator trains."""

import json

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data.codes import open_codes
from fvq_jax.evals.precision_recall import NEIGHBOURS
from fvq_jax.inference.generator import Generator
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.ops.pixels import to_uint8
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks import task_of
from fvq_jax.tasks.generator import samples
from fvq_jax.training.loop import train
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.tiny_generator import CLASSES, tiny_config, write_splits

COUNT, SIZE = 12, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Codes, the tokenizer that they name, and real pictures: every class has a colour."""
    folder = tmp_path_factory.mktemp("samples")
    tokenizer = Tokenizer(random_tokenizer())
    tokenizer.save_pretrained(folder / "tokenizer")
    write_splits(folder, size=SIZE, tokenizer=tokenizer.fingerprint)
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / "real" / str(label)).mkdir(parents=True)
        for number in range(25):
            pixels = rng.integers(0, 40, (SIZE, SIZE, 3), np.uint8) + np.uint8(50 * label)
            Image.fromarray(pixels).save(folder / "real" / str(label) / f"{number}.png")
    return folder


def config_of(folder, **changes):
    wanted = {
        "steps": 2,
        "optim.learning_rate": 0.1,  # so that two steps make codes differ in probability
        "mesh.codebook": 2,
        "data.tokenizer": str(folder / "tokenizer"),
        "eval.samples": COUNT,
        "eval.guidances": (1.0, 2.0),
        "eval.pictures": str(folder / "real"),
        "log.images": 2,
    }
    return tiny_config(folder, **wanted | changes)


def run(folder, name, **changes):
    config = config_of(folder, **changes)
    return train(task_of(config), config, folder / name).summary


@pytest.fixture(scope="module")
def finished(folder):
    return folder / "run", run(folder, "run")


@pytest.mark.slow
def test_the_result_line_has_the_scores_of_the_best_guidance(finished):
    _, result = finished
    assert result["samples"] == 2 * COUNT
    assert result["best_guidance"] in (1.0, 2.0)
    assert result["class_accuracy"] >= result["class_accuracy_unguided"]
    assert result["class_accuracy_of_real"] > 0.9
    assert result["samples_per_second"] > 0
    json.dumps(result)


@pytest.mark.slow
def test_the_page_and_tensorboard_show_samples_of_every_class(finished):
    workdir, _ = finished
    page = (workdir / "report" / "index.html").read_text()
    for label in range(CLASSES):
        assert page.count(f'alt="sample of class {label}"') == 2 * 2  # of both guidances
    assert any(b"samples" in path.read_bytes() for path in (workdir / "tensorboard").iterdir())


@pytest.mark.slow
def test_samples_are_those_that_the_saved_generator_draws_with_these_options(finished, folder, monkeypatch):
    workdir, _ = finished
    options = {"temperature": 0.5, "top_k": 24, "top_p": 0.8}
    shown = []
    monkeypatch.setattr(samples.ClassJudge, "accuracy", lambda self, images, labels: shown.append(images) or 1.0)
    changes = {f"eval.{name}": value for name, value in options.items()}
    config = config_of(folder, steps=1, init_from=str(workdir), **{"optim.learning_rate": 1e-12}, **changes)
    train(task_of(config), config, folder / "again")
    generator = Generator.from_pretrained(folder / "again", tokenizer=folder / "tokenizer")
    labels = np.arange(COUNT) % CLASSES

    def drawn(guidance, **chosen):
        return np.asarray(to_uint8(generator.sample(labels, config.seed, guidance=guidance, **chosen)))

    for images, guidance in zip([each for each in shown if len(each) == COUNT], (1.0, 2.0), strict=True):
        np.testing.assert_array_equal(images, drawn(guidance, **options))
        for name in options:
            others = {other: value for other, value in options.items() if other != name}
            assert not np.array_equal(images, drawn(guidance, **others))


@pytest.mark.slow
def test_samples_are_compared_with_a_reference(folder, monkeypatch):
    widths = {"2048": 2048, "spatial": 2023, "logits_unbiased": 1008}
    mixing = {name: np.random.default_rng(1).normal(size=(3, width)) for name, width in widths.items()}

    def inception(images):
        means = images.reshape(len(images), -1, 3).mean(axis=1) / 255
        return {name: (means @ matrix).astype(np.float32) for name, matrix in mixing.items()}

    monkeypatch.setattr(samples, "load_inception", lambda path, spatial: inception)
    (folder / "inception.pth").touch()
    pictures = np.random.default_rng(2).integers(0, 255, (NEIGHBOURS + 2, SIZE, SIZE, 3), np.uint8)
    np.savez(folder / "reference.npz", arr_0=pictures)
    files = {"eval.inception": str(folder / "inception.pth"), "eval.reference": str(folder / "reference.npz")}
    result = run(folder, "scored", **files)
    assert np.isfinite(result["fid"])
    assert result["best_guidance"] in (1.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data.tokenizer": ""}, "data.tokenizer"),
        ({"eval.samples": CLASSES - 1}, "eval.samples"),
        ({"eval.samples": 0}, "eval.pictures"),
        ({"eval.guidances": (1.0, -1.0)}, "eval.guidances"),
        ({"eval.guidances": (2.0,), "generator.class_dropout": 0.0}, "class_dropout"),
        ({"eval.inception": "missing.pth"}, "eval.inception"),
        ({"eval.reference": "missing.npz"}, "eval.inception"),
        ({"eval.pictures": "missing"}, "missing"),
    ],
)
def test_what_cannot_be_drawn_or_scored_is_refused(folder, changes, named):
    """Before the workdir is made, and not in the first evaluation."""
    with pytest.raises(InputError, match=named) as caught:
        run(folder, "refused", **changes)
    assert not (folder / "refused" / "checkpoints").exists()
    assert "\n" not in str(caught.value)


def test_codes_of_another_tokenizer_are_refused_by_both_fingerprints(folder):
    other = Tokenizer(random_tokenizer(seed=1))
    other.save_pretrained(folder / "other")
    with pytest.raises(InputError, match=other.fingerprint) as caught:
        run(folder, "refused", **{"data.tokenizer": str(folder / "other")})
    assert open_codes(folder / "train").info.tokenizer in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "condition", "message"),
    [
        (CLASSES, "", "do not say with which they were extracted: set eval.samples to 0"),
        (CLASSES, "none", "condition='none', and the tokenizer has a table for each of 4 classes"),
        (CLASSES + 1, "null", "the tokenizer has 5 classes, and the generator 4"),
    ],
)
def test_a_tokenizer_that_cannot_decode_samples_is_refused_before_training(folder, classes, condition, message):
    path = folder / f"conditional{classes}"
    tokenizer = Tokenizer(random_tokenizer(bridge=f"dit-XS/2-c{classes}"))
    tokenizer.save_pretrained(path)
    codes = write_splits(folder / f"codes-{condition}", size=SIZE, tokenizer=tokenizer.fingerprint, condition=condition)
    with pytest.raises(InputError, match=message):
        run(codes, "refused", **{"data.tokenizer": str(path)})
    assert not list((codes / "refused").glob("checkpoints/step_*"))
