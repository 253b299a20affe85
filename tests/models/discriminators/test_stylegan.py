import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.interop.discriminator import stylegan_from_torch
from fvq_jax.models.discriminators.stylegan import StyleGANDiscriminator, blur
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import load_case, relative_error


@pytest.fixture(scope="module")
def golden():
    case = load_case("stylegan")
    return case, stylegan_from_torch(case.weights)


def test_logits_equal_the_published_ones(golden):
    case, variables = golden
    logits = StyleGANDiscriminator(**case.config).apply(variables, case.images(), train=True)
    assert relative_error(logits, case.outputs["logits"]) < 1e-4


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_logits_in_float32(golden):
    case, variables = golden
    model = StyleGANDiscriminator(**case.config, dtype=jnp.bfloat16)
    logits = model.apply(variables, case.images()[:1], train=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), case.images(), train=True))
    assert {x.dtype for x in jax.tree.leaves((logits, shapes))} == {jnp.dtype(jnp.float32)}
    assert 1e-4 < relative_error(logits, case.outputs["logits"][:1]) < 0.1


def test_blur_mirrors_borders_and_keeps_constants():
    x = np.random.default_rng(0).normal(size=(1, 5, 4, 2)).astype(np.float32)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    np.testing.assert_allclose(blur(jnp.asarray(x)), np.einsum("bhwcij,ij->bhwc", windows, kernel), atol=1e-6)
    np.testing.assert_array_equal(blur(jnp.ones((1, 4, 4, 1))), 1)


def test_width_follows_image_size_and_multiplier(golden):
    case, variables = golden

    def widths(**fields):
        model = StyleGANDiscriminator(**fields)
        images = jnp.zeros((1, model.image_size, model.image_size, 3))
        return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]

    params = widths(image_size=256, channel_multiplier=2)
    assert params["conv_in"]["kernel"].shape == (3, 3, 3, 128)
    assert params["block_1"]["downsample"]["kernel"].shape == (3, 3, 512, 512)
    assert "block_5" in params
    assert "block_6" not in params
    assert widths(image_size=64)["conv_in"]["kernel"].shape[-1] == 256
    same = jax.tree.map(lambda a, b: a.shape == b.shape, widths(**case.config), variables["params"])
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_a_fresh_network_is_uniform_in_the_fan_in():
    model = StyleGANDiscriminator(image_size=8)
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=True))()["params"]
    for layer, fan_in in ((params["conv_in"], 27), (params["block_0"]["shortcut"], 512), (params["dense_0"], 8192)):
        for leaf in layer.values():
            bound = fan_in**-0.5
            assert bound * 0.9 < np.max(np.abs(leaf)) <= bound
            assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="image_size=48 must be one of 8, 16"):
        StyleGANDiscriminator(image_size=48).init(jax.random.key(0), jnp.zeros((1, 48, 48, 3)), train=False)
    with pytest.raises(ValueError, match="for images of 32x32 pixels, got 32x16"):
        StyleGANDiscriminator(image_size=32).init(jax.random.key(0), jnp.zeros((1, 32, 16, 3)), train=False)


def test_missing_tensors_are_named(golden):
    case, _ = golden
    without = {k: v for k, v in case.weights.items() if k != "blocks.3.net.2.bias"}
    with pytest.raises(InputError, match=r"lacks blocks\.3\.net\.2\.bias \(of"):
        stylegan_from_torch(without)
