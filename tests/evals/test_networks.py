import jax
import numpy as np
import pytest
import safetensors.numpy

from fvq_jax.evals.networks import FILES, load_networks
from fvq_jax.interop.lpips import lpips_params
from fvq_jax.models.frozen.lpips import ALEXNET, VGG16, Backbone, lpips_distance, lpips_shapes
from fvq_jax.runtime.errors import InputError


def published(backbone: Backbone, prefixes=None):
    """Random tensors under the published names, of the backbone and of the heads."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(0, 1 / np.sqrt(s.size / s.shape[-1] + 1), s.shape).astype(np.float32),
        lpips_shapes(backbone),
    )
    weights = {}
    for stage, convolutions in enumerate(backbone.stages):
        for index, *_ in convolutions:
            name = f"net.slice{stage + 1}.{index}" if prefixes else f"features.{index}"
            layer = params[f"features_{index}"]
            weights[f"{name}.weight"] = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
            weights[f"{name}.bias"] = layer["bias"]
    heads = {f"lin{s}.model.1.weight": np.abs(params[f"lin_{s}"]).reshape(1, -1, 1, 1) for s in range(5)}
    return weights, heads


def files(**given):
    return dict.fromkeys(FILES) | given


def test_lpips_of_alexnet_from_its_two_files(tmp_path):
    weights, heads = published(ALEXNET)
    safetensors.numpy.save_file(weights, tmp_path / "alexnet.safetensors")
    safetensors.numpy.save_file(heads, tmp_path / "alex.safetensors")
    given = files(alexnet=tmp_path / "alexnet.safetensors", lpips_alex=tmp_path / "alex.safetensors")
    networks = load_networks(given, 32)
    assert set(networks.lpips) == {"lpips_alex"}
    assert set(networks.not_computed) == {"rfid", "inception_score", "lpips_vgg"}
    a, b = np.random.default_rng(1).integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)
    distance = jax.jit(lpips_distance, static_argnames="backbone")
    params = lpips_params(weights | heads, ALEXNET, "a", "b")
    scaled = (x.astype(np.float32) / 127.5 - 1 for x in (a, b))
    np.testing.assert_allclose(
        networks.lpips["lpips_alex"](a, b), distance(params, *scaled, backbone=ALEXNET), rtol=1e-5
    )


def test_heads_that_are_not_given_are_those_of_the_installed_package(tmp_path, monkeypatch):
    weights, heads = published(VGG16)
    safetensors.numpy.save_file(weights, tmp_path / "vgg16.safetensors")
    safetensors.numpy.save_file(heads, tmp_path / "heads.safetensors")
    found = {VGG16: tmp_path / "heads.safetensors"}
    monkeypatch.setattr("fvq_jax.evals.networks.installed_heads", found.get)
    networks = load_networks(files(vgg16=tmp_path / "vgg16.safetensors"), 64)
    assert set(networks.lpips) == {"lpips_vgg"}
    assert set(load_networks(files(), 64).not_computed) >= {"lpips_vgg", "lpips_alex"}


def test_what_is_missing_is_named_with_what_to_get(tmp_path):
    weights, heads = published(VGG16, prefixes=True)
    safetensors.numpy.save_file(heads, tmp_path / "heads.safetensors")
    networks = load_networks(files(lpips_vgg=tmp_path / "heads.safetensors"), 64)
    assert networks.inception is None
    assert networks.lpips == {}
    assert networks.not_computed["lpips_vgg"].startswith("not given: get torchvision's VGG16 weights")
    assert networks.not_computed["lpips_vgg"].endswith("pass --vgg16=FILE")
    assert "not given: get the LPIPS v0.1 heads for AlexNet (alex.pth" in networks.not_computed["lpips_alex"]
    assert networks.not_computed["rfid"] == networks.not_computed["inception_score"]
    safetensors.numpy.save_file(weights | heads, tmp_path / "both.safetensors")
    networks = load_networks(files(lpips_vgg=tmp_path / "both.safetensors"), 16)
    assert set(networks.lpips) == {"lpips_vgg"}
    assert networks.not_computed["lpips_alex"] == "needs pictures of at least 31 pixels, not 16"


def test_a_wrong_file_is_refused(tmp_path):
    for called, name in (({}, "--lpips-alex"), ({"lpips_alex": "a.field"}, "a.field")):
        with pytest.raises(InputError, match=f"^{name}: there is no file .*none.pth' "):
            load_networks(files(lpips_alex=tmp_path / "none.pth"), 64, called)
    (tmp_path / "vgg.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="damaged"):
        load_networks(files(lpips_vgg=tmp_path / "vgg.pth"), 64)
