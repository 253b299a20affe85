import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from fvq_jax.evals.inception import load_inception
from fvq_jax.interop.inception import inception_params
from fvq_jax.models.frozen.inception import SPATIAL_FEATURES, resize_bilinear
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import load_case, relative_error
from tests.helpers.torch_inception import Network


@pytest.fixture(scope="module")
def case():
    return load_case("inception_v3")


def test_features_and_logits_equal_the_published_ones(case, tmp_path):
    torch.save({name: torch.from_numpy(value) for name, value in case.weights.items()}, tmp_path / "inception.pth")
    images = case.inputs["image"].transpose(0, 2, 3, 1)
    outputs = load_inception(tmp_path / "inception.pth")(images)
    assert set(outputs) == {"64", "192", "768", "2048", "logits_unbiased"}
    for name, expected in case.outputs.items():
        assert relative_error(outputs[name], expected) < 1e-4, name


@pytest.mark.slow
def test_features_equal_those_of_an_independent_program(case, tmp_path):
    """With the features of sFID: which layer, which of its channels, and their order."""
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    exact = Network(case.weights, torch.float64)(images)
    safetensors.numpy.save_file(case.weights, tmp_path / "inception.safetensors")
    outputs = load_inception(tmp_path / "inception.safetensors", spatial=True)(images)
    assert exact["spatial"].shape == (2, SPATIAL_FEATURES)
    for name, expected in exact.items():
        assert relative_error(outputs[name], expected) < 1e-5, name


def test_resize_aligns_top_left_corners():
    ramp = jnp.arange(4.0).reshape(1, 1, 4, 1)
    wide = resize_bilinear(jnp.broadcast_to(ramp, (1, 3, 4, 1)), 8)
    np.testing.assert_allclose(
        wide[0, 5, :, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    )  # the last pixel has no right neighbour
    np.testing.assert_allclose(resize_bilinear(wide, 4)[0, 0, :, 0], [0, 1, 2, 3])  # every second pixel, unsmoothed


def test_other_files_are_refused(case, tmp_path):
    with pytest.raises(InputError, match=r"^there is no file '.*none.pth': get pt_inception-2015-12-05"):
        load_inception(tmp_path / "none.pth")
    safetensors.numpy.save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors lacks .*\.conv\.weight, .* \(of 471 needed tensors\)"):
        load_inception(tmp_path / "other.safetensors")
    with pytest.raises(
        InputError, match=r"not FID's .*: fc has a kernel of shape \(2048, 1000\), needs \(2048, 1008\)"
    ):
        inception_params(case.weights | {"fc.weight": np.zeros((1000, 2048), np.float32)}, "torchvision.pth")


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 8, 8, 4), (0, 8, 8, 3)])
def test_what_is_no_batch_of_images_is_refused(shape, case, tmp_path):
    safetensors.numpy.save_file(case.weights, tmp_path / "inception.safetensors")
    with pytest.raises(InputError, match=r"must be uint8 \[b, H, W, 3\], not uint8"):
        load_inception(tmp_path / "inception.safetensors")(np.zeros(shape, np.uint8))
