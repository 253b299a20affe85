import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.models.decoder import Decoder
from fvq_jax.models.discriminators.patchgan import PatchGAN
from fvq_jax.models.discriminators.stylegan import StyleGANDiscriminator
from fvq_jax.models.encoder import Encoder
from fvq_jax.ops import convolution as module
from fvq_jax.ops.convolution import convolution
from tests.helpers.chips import gpu_devices, needs_cuda, needs_libtpu, tpu_devices
from tests.helpers.golden_case import relative_error

SETTINGS = {"dimension_numbers": module.ORDER, "precision": "highest"}


def arrays(b, height, width, c, f, size, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (b, height, width, c), (size, size, c, f)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def gradients(of, images, kernel, strides, padding):
    """Value and both gradients of a weighted sum of the outputs, whose weights tell all outputs apart."""

    def loss(images, kernel):
        out = of(images, kernel, strides, padding, **SETTINGS)
        return jnp.sum(jnp.sin(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)) * out)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(images, kernel)


def convolutions(function, *arguments, platform="cpu"):
    """How many convolutions the program has."""
    return (
        jax.jit(function)
        .trace(*arguments)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.convolution")
    )


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    rows=st.integers(1, 4),
    height=st.integers(4, 13),
    size=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.sampled_from(["SAME", "VALID", ((0, 1), (0, 1)), ((1, 1), (1, 1)), ((2, 0), (0, 2))]),
)
def test_the_gradient_in_bands_is_that_of_the_whole(rows, height, size, stride, padding):
    images, kernel = arrays(2, height, 5, 3, 8, size)
    out = jax.eval_shape(
        lambda i, k: lax.conv_general_dilated(i, k, (stride, stride), padding, **SETTINGS), images, kernel
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BAND", rows * 2 * out.shape[2])  # so many rows of the output are a band
        found = gradients(convolution, images, kernel, (stride, stride), padding)
    expected = gradients(lax.conv_general_dilated, images, kernel, (stride, stride), padding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)


def of_a_large_batch(of):
    return lambda images, kernel: gradients(of, images, kernel, (1, 1), "SAME")


def test_the_gradient_of_a_kernel_of_one_pixel_is_a_product_on_a_cpu_and_nowhere_else():
    pixels = arrays(2, 6, 5, 4, 8, 1)
    found, expected = (gradients(of, *pixels, (1, 1), "SAME") for of in (convolution, lax.conv_general_dilated))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)
    assert convolutions(of_a_large_batch(convolution), *pixels) == 2
    for platform in ("tpu", "cuda"):
        assert convolutions(of_a_large_batch(convolution), *pixels, platform=platform) == 3


@pytest.mark.parametrize(("stride", "padding"), [(2, ((1, 1), (1, 1))), (1, ((1, -1), (0, 0))), (1, ((0, 0), (1, 1)))])
def test_a_kernel_of_one_pixel_that_moves_pixels_is_no_product(stride, padding):
    pixels = arrays(1, 2, 2, 4, 8, 1)
    found = gradients(convolution, *pixels, (stride, stride), padding)
    expected = gradients(lax.conv_general_dilated, *pixels, (stride, stride), padding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)


def test_a_large_batch_is_cut_into_bands_on_a_cpu_and_nowhere_else():
    large = arrays(32, 16, 16, 4, 8, 3)
    assert convolutions(of_a_large_batch(convolution), *large) == 2 + 32 * 16 * 16 // module.BAND
    for platform in ("tpu", "cuda"):
        assert convolutions(of_a_large_batch(convolution), *large, platform=platform) == 3


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(lambda: tpu_devices("v5e:2x2"), marks=needs_libtpu, id="tpu"),
        pytest.param(gpu_devices, marks=needs_cuda, id="gpu"),
    ],
)
def test_the_program_of_an_accelerator_does_not_change(devices, monkeypatch):
    monkeypatch.setattr(module, "BAND", 8)
    sharding = SingleDeviceSharding(devices()[0])
    small = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arrays(1, 8, 8, 8, 8, 3)]

    def operations(of):
        def loss(images, kernel):
            return jnp.sum(of(images, kernel, (1, 1), "SAME", **SETTINGS) ** 2)

        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*small).compile().as_text()
        plain = re.sub(r", metadata=\{[^}]*\}|, backend_config=.*|%[\w.-]+", "", program)
        return sorted(line for line in plain.splitlines() if " = " in line)

    assert operations(convolution) == operations(lax.conv_general_dilated)


def test_few_features_and_small_batches_stay_whole():
    def loss(images, kernel):
        return jnp.sum(convolution(images, kernel, (1, 1), "SAME", **SETTINGS) ** 2)

    for shape in ((32, 16, 16, 8, 3, 3), (2, 16, 16, 8, 8, 3)):
        assert convolutions(jax.grad(loss, argnums=(0, 1)), *arrays(*shape)) == 3


@pytest.mark.parametrize(
    ("network", "images", "options"),
    [
        (Encoder(32, (1, 2), 1, 16), (1, 8, 8, 3), {}),
        (Decoder(32, (1, 2), 1), (1, 4, 4, 16), {}),
        (PatchGAN(ndf=8, n_layers=1), (1, 16, 16, 3), {"train": False}),
        (StyleGANDiscriminator(image_size=32), (1, 32, 32, 3), {"train": False}),
    ],
)
def test_every_trained_convolution_is_one_of_these(network, images, options):
    images = jnp.zeros(images)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, **options))
    program = jax.make_jaxpr(lambda variables: network.apply(variables, images, **options))(variables)
    assert "conv_general_dilated[" in str(program)
    assert not plain_convolutions(program.jaxpr)


def plain_convolutions(jaxpr):
    """Convolutions outside of functions with a gradient of their own."""
    found = [equation for equation in jaxpr.eqns if equation.primitive.name == "conv_general_dilated"]
    for equation in jaxpr.eqns:
        if not equation.primitive.name.startswith("custom_vjp"):
            inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
            found += [one for value in inner if hasattr(value, "eqns") for one in plain_convolutions(value)]
    return found


def test_many_bands_are_summed_in_float32():
    images, kernel = (jnp.asarray(1 + array, jnp.bfloat16) for array in arrays(1, 64, 32, 2, 8, 3))

    def gradient(of, images, kernel):
        return jax.jit(jax.grad(lambda k: jnp.sum(of(images, k, (1, 1), "SAME", **SETTINGS).astype(jnp.float32))))(
            kernel
        )

    expected = gradient(lax.conv_general_dilated, *(array.astype(jnp.float32) for array in (images, kernel)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BAND", 32)
        found = gradient(convolution, images, kernel)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found.astype(jnp.float32), expected) < 5e-3


def test_a_large_batch_has_larger_and_not_more_bands():
    images, kernel = arrays(1, 2 * module.MOST, 4, 2, 8, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BAND", 4)
        assert convolutions(of_a_large_batch(convolution), images, kernel) == 2 + module.MOST


def test_it_can_be_differentiated_twice(monkeypatch):
    images, kernel = arrays(2, 6, 4, 3, 8, 3)

    def penalty(of, images, kernel):  # as the penalty on the gradient of a discriminator
        def score(images, kernel):
            return jnp.sum(jnp.tanh(of(images, kernel, (1, 1), "SAME", **SETTINGS)))

        by_images, by_kernel = jax.grad(score, argnums=(0, 1))(images, kernel)
        return jnp.sum(by_images**2) + jnp.sum(by_kernel**2)

    expected = jax.grad(penalty, argnums=2)(lax.conv_general_dilated, images, kernel)
    monkeypatch.setattr(module, "BAND", 16)
    found = jax.grad(penalty, argnums=2)(convolution, images, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_divided_batch_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(module, "BAND", 64)
    images, kernel = arrays(8, 6, 4, 3, 8, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    divided = jax.device_put(images, NamedSharding(mesh, P("data")))
    expected = gradients(lax.conv_general_dilated, images, kernel, (1, 1), "SAME")
    found = gradients(convolution, divided, kernel, (1, 1), "SAME")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)


def test_dilation_and_groups_are_refused():
    images = jnp.zeros((1, 8, 8, 8))
    with pytest.raises(ValueError, match="images must be NHWC and kernels HWIO"):
        convolution(images, jnp.zeros((3, 3, 8, 8)), (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC"))
    for setting in ({"kernel_dilation": 2}, {"input_dilation": 2}, {"feature_group_count": 2}):
        layer = nn.Conv(8, (3, 3), conv_general_dilated=convolution, **setting)
        with pytest.raises(ValueError, match="dilation and groups"):
            layer.init(jax.random.key(0), images)
