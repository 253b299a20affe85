import jax
import numpy as np
import pytest
from PIL import Image

from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.sources import make_source
from fvq_jax.evals import reconstruction
from fvq_jax.evals.frechet import frechet_distance
from fvq_jax.evals.networks import Networks
from fvq_jax.models.frozen.inception import CLASSES
from fvq_jax.ops.code_usage import usage_by_position
from fvq_jax.ops.pixels import to_uint8
from fvq_jax.runtime.errors import DataError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.tasks.tokenizer import evaluation
from fvq_jax.tasks.tokenizer.evaluation import Evaluator, evaluation_networks
from tests.helpers.hanging_source import HangingSource
from tests.helpers.tiny import make_step, random_state, tiny_config


def parts(source=None, **changes):
    """The evaluator of a run, the variables of a random tokenizer, and the pictures."""
    config = tiny_config(**changes)
    step = make_step(config, make_mesh(data=2, codebook=4))
    pictures = make_source("photos", "eval", image_size=16, eval_images=config.eval.images)
    source = pictures if source is None else source(pictures)
    evaluator = Evaluator(config, step.mesh, step.task.net, source, evaluation_networks(config))
    return evaluator, step.task.scored_variables(random_state(step)), source


def projected(images):
    flat = images.reshape(len(images), -1) / np.float32(255)
    return flat @ np.random.default_rng(0).normal(size=(flat.shape[1], 8)).astype(np.float32)


@pytest.fixture
def seen(monkeypatch):
    """Every batch that a stand-in for InceptionV3 was asked about, and the files that networks were loaded from."""
    seen = {"batches": [], "files": None}

    def features(images):
        seen["batches"].append(images)
        return {"8": projected(images), "logits_unbiased": np.zeros((len(images), CLASSES), np.float32)}

    def load(files, size, called):
        seen["files"], seen["called"] = files, called
        return Networks(None if files["inception"] is None else features, {}, {})

    monkeypatch.setattr(evaluation, "load_networks", load)
    monkeypatch.setattr(reconstruction, "RFID_FEATURES", 8)
    return seen


def test_a_state_is_scored_on_its_mesh_with_rfid_if_asked_for(seen, tmp_path):
    (tmp_path / "inception.pth").write_bytes(b"weights")
    names = {
        "eval.inception": str(tmp_path / "inception.pth"),
        "loss.vgg16_path": "vgg.pth",
        "loss.lpips_path": "lin.pth",
    }
    evaluator, variables, source = parts(**names)
    assert seen["files"] == {
        "inception": names["eval.inception"],
        "vgg16": "vgg.pth",
        "lpips_vgg": "lin.pth",
        "alexnet": None,
        "lpips_alex": None,
    }
    metrics, _, found = evaluator.evaluate(variables)
    crops = np.stack([source[index]["image"] for index in range(24)])
    folded = jax.jit(evaluator.folded)(variables)
    reconstructions, codes, error, power = jax.jit(evaluator.reconstruct)(folded, crops)
    decoded = np.asarray(to_uint8(reconstructions))
    np.testing.assert_array_equal(found.sums.code_counts, [np.bincount(np.ravel(codes), minlength=64)])
    assert metrics["quantization_error"] == pytest.approx(float(np.mean(error)), rel=1e-4)
    assert metrics["relative_quantization_error"] == pytest.approx(float(np.sum(error) / np.sum(power)), rel=1e-4)
    of_position = usage_by_position(found.sums.code_counts[0], evaluator._net.quantizer.positions())
    assert len(of_position) == 4
    assert metrics["positions/usage_min"] == of_position.min()
    expected = frechet_distance(*(projected(images) for images in (crops, decoded)))
    assert metrics["rfid"] == pytest.approx(expected, rel=1e-3)
    assert metrics["l1"] == pytest.approx(np.mean(np.abs(decoded / 255 - crops / 255)), abs=1e-4)

    batches = len(seen["batches"])
    again, _, _ = evaluator.evaluate(variables)
    assert len(seen["batches"]) - batches == batches // 2  # the crops are known
    assert again == pytest.approx(metrics, rel=1e-6)

    points, share = evaluator.plane(variables)
    table = np.asarray(folded["params"]["quantizer"]["codebook"], np.float64)
    variances = np.linalg.svd(table - table.mean(axis=0), compute_uv=False) ** 2
    np.testing.assert_allclose(share, (variances / variances.sum())[:2], rtol=1e-3)
    np.testing.assert_allclose(np.var(points, axis=0) * 64, variances[:2], rtol=1e-3)


def test_its_program_is_compiled_with_the_options_of_the_mesh(monkeypatch):
    monkeypatch.setattr(evaluation, "compiler_options", lambda mesh: {"no_such_option": mesh.size})
    evaluator, variables, _ = parts()
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        evaluator.evaluate(variables)


def test_without_its_file_there_is_no_rfid(seen):
    parts()
    assert set(seen["files"].values()) == {None}
    assert seen["called"] == {"inception": "eval.inception", "vgg16": "loss.vgg16_path", "lpips_vgg": "loss.lpips_path"}


def test_pictures_that_stop_coming_end_it_after_the_timeout_of_the_run(seen):

    def hang(source):
        return HangingSource(source, Sample(source, len(source)).index(20))  # after the first batch

    evaluator, variables, hanging = parts(hang, **{"data.timeout": 0.5})
    try:
        with pytest.raises(DataError, match=r"no batch for (0|2)\.5 s"):
            evaluator.evaluate(variables)
    finally:
        hanging.release()


def test_random_crops_are_scored_and_called_so(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    folders = {"data.source": "folder", "data.eval_dir": str(tmp_path / "pictures")}
    config = tiny_config(**folders, **{"eval.images": 0, "eval.crops": 20})
    step = make_step(config, make_mesh(data=8, codebook=1))
    state = random_state(step)
    found = step.task.evaluate(state)
    tokens = (config.data.image_size // step.task.net.downsampling) ** 2
    assert (found.metrics["images"], found.metrics["tokens"]) == (20, 20 * tokens)
    assert found.metrics["random_crops"] == 20
    step.task.report(state, found, tmp_path, [])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<b>20</b> random crops of <b>" in page
    assert "(20 random crops as in training, seed 0; " in page
