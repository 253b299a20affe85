import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from fvq_jax.interop.lpips import installed_heads, load_lpips, lpips_params
from fvq_jax.interop.torch_file import read_tensors
from fvq_jax.models.frozen.lpips import ALEXNET, SCALE, SHIFT, VGG16, lpips_distance, lpips_shapes
from fvq_jax.runtime.errors import InputError
from tests.helpers import torch_golden
from tests.helpers.golden64 import in_float32, in_float64, relative_norm
from tests.helpers.golden_case import load_case, relative_error

# How far the gradient moves when the kinks of all ReLUs move by eight float32 roundings, in Euclidean length (found by
# PyTorch in float64). Six of the 6.6 million units lie that near to their kink, and rounding, which differs between
# processors, decides on which side of it each of them is; all other rounding is two hundred times smaller.
MOVED_BY_KINKS = 1.0e-3


@pytest.fixture(scope="module")
def case():
    return load_case("lpips_vgg16")


@pytest.fixture(scope="module")
def files(case, tmp_path_factory):
    """The golden weights as users have them: torchvision's VGG16 in the old format, the heads, and both together."""
    folder = tmp_path_factory.mktemp("lpips")
    heads = {k: torch.from_numpy(v) for k, v in case.weights.items() if k.startswith("lin")}
    vgg16 = {
        "features." + k.split(".", 2)[2]: torch.from_numpy(v) for k, v in case.weights.items() if k.startswith("net")
    }
    vgg16["classifier.0.weight"] = torch.zeros(2, 2)
    torch.save(vgg16, folder / "vgg16-397923af.pth", _use_new_zipfile_serialization=False)
    torch.save(heads, folder / "vgg.pth")
    torch.save({k: torch.from_numpy(v) for k, v in case.weights.items()}, folder / "vgg_lpips.pth")
    return folder


@pytest.fixture(scope="module")
def params(files):
    return load_lpips(files / "vgg16-397923af.pth", files / "vgg.pth")


def test_distance_and_gradient_equal_the_published_ones(case):
    actual = in_float64("lpips_vgg16")
    assert {value.dtype.name for value in actual.values()} == {"float64"}
    assert relative_error(actual["distance"], case.outputs["distance"]) < 1e-5
    assert relative_error(actual["grad_b"], case.outputs["grad_b"]) < 1e-4


def test_an_independent_implementation_computes_the_same_in_float64():
    actual, expected = in_float64("lpips_vgg16"), torch_golden.compute("lpips_vgg16", torch.float64)
    assert relative_error(actual["distance"], expected["distance"]) < 1e-12
    assert relative_error(actual["grad_b"], expected["grad_b"]) < 1e-9


@pytest.mark.slow
def test_float32_differs_by_rounding_and_the_units_that_it_moves_across_a_kink():
    exact, rounded = in_float64("lpips_vgg16"), in_float32("lpips_vgg16")
    pytorch = torch_golden.compute("lpips_vgg16", torch.float32)
    moved = [
        relative_norm(torch_golden.compute("lpips_vgg16", torch.float64, kink=kink)["grad_b"], exact["grad_b"])
        for kink in (-8 * 2**-23, 8 * 2**-23)
    ]
    assert 0.5 < np.linalg.norm(moved) / MOVED_BY_KINKS < 2
    for results in (rounded, pytorch):
        assert {value.dtype.name for value in results.values()} == {"float32"}
        assert relative_norm(results["distance"], exact["distance"]) < 1e-6
        assert relative_norm(results["grad_b"], exact["grad_b"]) < 2 * MOVED_BY_KINKS


def test_bfloat16_features_give_a_float32_distance(case, params):
    a, b = case.images("a"), case.images("b")
    distance = jax.jit(lpips_distance, static_argnames="dtype")(params, a, b, dtype=jnp.bfloat16)
    assert distance.dtype == jnp.float32
    assert 1e-4 < relative_error(distance, case.outputs["distance"]) < 0.1


@jax.jit
def gradients(params, a, b):
    return jax.grad(lambda params, a, b: lpips_distance(params, a, b).sum(), argnums=(0, 1, 2))(params, a, b)


def test_gradient_reaches_both_images_but_no_parameter(params):
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 1, 16, 16, 3)).astype(np.float32)
    to_params, *to_images = gradients(params, a, b)
    assert not any(np.any(x) for x in jax.tree.leaves(to_params))
    assert all(np.any(x) for x in to_images)


def test_gradient_is_finite_where_features_vanish(params):
    dead = jax.tree.map(np.zeros_like, params)
    images = np.zeros((1, 16, 16, 3), np.float32)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients(dead, images, images + 0.5)))


def test_equal_images_have_distance_zero_and_each_pair_its_own(params):
    a, b = np.random.default_rng(1).uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)
    b[0] = a[0]
    first, second = lpips_distance(params, jnp.asarray(a), jnp.asarray(b))
    assert first == 0
    assert second > 0


def test_small_images_are_refused(params):
    with pytest.raises(ValueError, match="at least 16 pixels, got 16x8"):
        lpips_distance(params, jnp.zeros((1, 16, 8, 3)), jnp.zeros((1, 16, 8, 3)))


@pytest.mark.parametrize("vgg16_path", [None, ""])
def test_the_combined_file_needs_no_other(files, params, vgg16_path):
    combined = load_lpips(vgg16_path, files / "vgg_lpips.pth")
    jax.tree.map(np.testing.assert_array_equal, combined, params)


def test_safetensors_files_give_the_same(files, params, case, tmp_path):
    safetensors.numpy.save_file(case.weights, tmp_path / "both.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_lpips(None, tmp_path / "both.safetensors"), params)


def test_shapes_are_those_of_the_files(params):
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert lpips_shapes() == expected
    assert sum(x.size for x in jax.tree.leaves(expected)) == 14_714_688 + 1472  # VGG16's convolutions, the heads


def installed(monkeypatch, folder):
    """Makes `folder` a place of packages that comes before all others, with a package lpips that cannot be imported."""
    (folder / "lpips" / "weights" / "v0.1").mkdir(parents=True)
    (folder / "lpips" / "__init__.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(folder)
    return folder / "lpips" / "weights" / "v0.1"


def test_heads_of_the_installed_package_are_used_unless_a_file_is_given(files, params, tmp_path, monkeypatch, caplog):
    weights = installed(monkeypatch, tmp_path)
    assert installed_heads(VGG16) is None
    (weights / "vgg.pth").write_bytes((files / "vgg.pth").read_bytes())
    with caplog.at_level("INFO"):
        jax.tree.map(np.testing.assert_array_equal, load_lpips(files / "vgg16-397923af.pth", ""), params)
    assert f"heads was given, so those of the installed package are used: {weights / 'vgg.pth'}" in caplog.text
    assert installed_heads(ALEXNET) is None
    (weights / "vgg.pth").write_bytes(b"")
    jax.tree.map(np.testing.assert_array_equal, load_lpips(files / "vgg16-397923af.pth", files / "vgg.pth"), params)
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert installed_heads(VGG16) is None


@pytest.mark.parametrize("backbone", [VGG16, ALEXNET], ids=lambda backbone: backbone.name)
def test_the_trained_heads_of_the_package_are_read(backbone):
    """Their channels are weighted by how much people see of them, never by less than nothing."""
    if (path := installed_heads(backbone)) is None:
        pytest.skip("the package is not installed: pip install --no-deps lpips")
    tensors = read_tensors(path)
    for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
        np.testing.assert_array_equal(tensors[name], value)
    for stage, widest in enumerate(convolutions[-1][1] for convolutions in backbone.stages):
        weights = tensors[f"lin{stage}.model.1.weight"].reshape(-1)
        assert weights.shape == (widest,)
        assert weights.min() >= 0
        assert weights.max() > 0


def test_missing_files_say_what_to_get_and_which_field_to_set(files, tmp_path, monkeypatch):
    installed(monkeypatch, tmp_path)  # without a file of heads
    with pytest.raises(InputError, match=r"^loss\.lpips_path=\(not set\) .*v0\.1 heads.* set loss\.lpips_path to it$"):
        load_lpips(files / "vgg16-397923af.pth", None)
    with pytest.raises(InputError, match=r"^loss\.lpips_path='.*none\.pth' is no file"):
        load_lpips(files / "vgg16-397923af.pth", tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"^loss\.vgg16_path=\(not set\) .*vgg16-397923af\.pth.* set loss\.vgg16_path"):
        load_lpips(None, files / "vgg.pth")


def test_wrong_files_name_what_they_lack(files, tmp_path):
    with pytest.raises(InputError, match=r"vgg16-397923af\.pth lacks lin0\.model\.1\.weight, .* and 1 more \(of 5"):
        load_lpips(files / "vgg16-397923af.pth", files / "vgg16-397923af.pth")
    with pytest.raises(InputError, match=r"vgg\.pth lacks features\.0\.weight, .* and 22 more \(of 26"):
        load_lpips(files / "vgg.pth", files / "vgg.pth")
    heads = {f"lin{i}.model.1.weight": torch.ones(1, 64, 1, 1) for i in range(5)}
    torch.save(heads, tmp_path / "alex.pth")
    with pytest.raises(InputError, match=r"not for VGG16: lin_1 has shape \(64,\), needs \(128,\)"):
        load_lpips(files / "vgg16-397923af.pth", tmp_path / "alex.pth")


def alexnet_tensors():
    """Random weights under the names of torchvision's AlexNet and of the LPIPS heads."""
    rng = np.random.default_rng(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    tensors = {}
    for stage, (index, shape) in enumerate(shapes.items()):
        scale = np.sqrt(2 / np.prod(shape[1:]))
        tensors[f"features.{index}.weight"] = (rng.normal(size=shape) * scale).astype(np.float32)
        tensors[f"features.{index}.bias"] = (0.1 * rng.normal(size=shape[0])).astype(np.float32)
        tensors[f"lin{stage}.model.1.weight"] = rng.uniform(size=(1, shape[0], 1, 1)).astype(np.float32)
    return tensors


def test_alexnet_is_torchvisions():
    """Features as PyTorch computes them with torchvision's strides, paddings and poolings; the distance in numpy."""
    tensors = alexnet_tensors()
    a, b = np.random.default_rng(1).uniform(-1, 1, (2, 2, 63, 47, 3)).astype(np.float32)
    functional = torch.nn.functional
    features = []
    for images in (a, b):
        x = torch.from_numpy((images - SHIFT) / SCALE).permute(0, 3, 1, 2)
        features.append([])
        for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            x = functional.max_pool2d(x, 3, 2) if index in (3, 6) else x
            kernel, bias = (torch.from_numpy(tensors[f"features.{index}.{leaf}"]) for leaf in ("weight", "bias"))
            x = functional.relu(functional.conv2d(x, kernel, bias, stride, padding))
            features[-1].append((x / (x.norm(dim=1, keepdim=True) + 1e-10)).numpy())
    expected = sum(
        np.sum((x - y) ** 2 * tensors[f"lin{stage}.model.1.weight"], axis=1).mean(axis=(1, 2))
        for stage, (x, y) in enumerate(zip(*features, strict=True))
    )
    params = lpips_params(tensors, ALEXNET, "alexnet.pth", "alex.pth")
    distance = jax.jit(lpips_distance, static_argnames="backbone")(params, a, b, backbone=ALEXNET)
    assert relative_error(distance, expected) < 1e-4
    with pytest.raises(ValueError, match="at least 31 pixels, got 30x40"):
        lpips_distance(params, jnp.zeros((1, 30, 40, 3)), jnp.zeros((1, 30, 40, 3)), backbone=ALEXNET)


def test_heads_of_another_backbone_are_refused():
    tensors = alexnet_tensors()
    vgg16 = {f"lin{stage}.model.1.weight": np.ones((1, c, 1, 1)) for stage, c in enumerate((64, 128, 256, 512, 512))}
    with pytest.raises(InputError, match=r"not for AlexNet: lin_1 has shape \(128,\), needs \(192,\)"):
        lpips_params(tensors | vgg16, ALEXNET, "alexnet.pth", "vgg.pth")
