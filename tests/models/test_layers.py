import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.decoder import Decoder
from fvq_jax.models.encoder import Encoder
from fvq_jax.models.layers import AttentionBlock, Conv, Downsample, GroupNorm, ResBlock, Upsample

MULT = (1, 2, 1)


def images(b=2, side=16, channels=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(b, side, side, channels)), jnp.float32)


def abstract(module, *inputs):
    """Shapes of the output and of the parameters, by path, without running anything."""
    output, variables = jax.eval_shape(functools.partial(module.init_with_output, jax.random.key(0)), *inputs)
    params = jax.tree.leaves_with_path(variables["params"])
    return output, {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in params}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Conv(48), (2, 8, 8, 48)),
        (Conv(48, kernel_size=1), (2, 8, 8, 48)),
        (Conv(48, stride=2, padding=((0, 1), (0, 1))), (2, 4, 4, 48)),
        (GroupNorm(), (2, 8, 8, 64)),
        (ResBlock(64), (2, 8, 8, 64)),
        (ResBlock(96), (2, 8, 8, 96)),
        (AttentionBlock(), (2, 8, 8, 64)),
        (Downsample(), (2, 4, 4, 64)),
        (Upsample(), (2, 16, 16, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(module, expected, dtype):
    output, params = abstract(module.clone(dtype=dtype), jax.ShapeDtypeStruct((2, 8, 8, 64), dtype))
    assert output.shape == expected
    assert output.dtype == dtype
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(jnp.float32)}


def test_a_shortcut_only_where_channels_change():
    x = jax.ShapeDtypeStruct((1, 4, 4, 64), jnp.float32)
    assert not [name for name in abstract(ResBlock(64), x)[1] if "shortcut" in name]
    assert abstract(ResBlock(32), x)[1]["shortcut/conv/kernel"].shape == (1, 1, 64, 32)


def test_blocks_add_to_their_input():
    x = images(channels=32)
    for block, last in ((ResBlock(32), "conv2"), (AttentionBlock(), "out")):
        params = jax.jit(block.init)(jax.random.key(0), x)["params"]
        params[last] = jax.tree.map(jnp.zeros_like, params[last])
        np.testing.assert_array_equal(block.apply({"params": params}, x), x)


def test_attention_sees_every_position():
    x = images(1, 4, 32)
    block = AttentionBlock()
    params = jax.jit(block.init)(jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda x: block.apply(params, x)[0, 0, 0].sum()))(x)
    assert np.all(np.abs(gradient).max(axis=(0, 3)) > 0)


def reach(module, side):
    """Which input rows feed output row 0, and which the last one, for a module that treats rows and columns alike."""
    x = jnp.ones((1, side, side, 32))
    params = jax.tree.map(jnp.ones_like, jax.eval_shape(module.init, jax.random.key(0), x))

    def rows(pick):
        gradient = jax.grad(lambda x: module.apply(params, x)[0, pick].sum())(x)
        np.testing.assert_array_equal(np.any(gradient, axis=(0, 1, 3)), True)
        return np.flatnonzero(np.any(gradient, axis=(0, 2, 3)))

    return [rows(0), rows(-1)]


def test_downsampling_pads_at_the_right_and_the_bottom_only():
    first, last = reach(Downsample(), 8)
    np.testing.assert_array_equal(first, [0, 1, 2])
    np.testing.assert_array_equal(last, [6, 7])
    x = images(1, 8, 32)
    params = jax.jit(Downsample().init)(jax.random.key(0), x)
    conv = params["params"]["conv"]["conv"]
    padded = np.pad(np.asarray(x, np.float64)[0], ((0, 1), (0, 1), (0, 0)))
    corner = np.einsum("ijc,ijcf->f", padded[6:9, 6:9], conv["kernel"]) + conv["bias"]
    np.testing.assert_allclose(Downsample().apply(params, x)[0, 3, 3], corner, rtol=1e-4, atol=1e-5)


def test_upsampling_repeats_pixels():
    x = images(1, 3, 32)
    params = jax.jit(Upsample().init)(jax.random.key(0), x)
    kernel = np.zeros((3, 3, 32, 32), np.float32)
    kernel[1, 1] = np.eye(32)  # the convolution as identity
    params["params"]["conv"]["conv"] = {"kernel": kernel, "bias": np.zeros(32, np.float32)}
    np.testing.assert_array_equal(Upsample().apply(params, x), np.repeat(np.repeat(x, 2, 1), 2, 2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_norm_equals_numpy_with_float32_statistics(dtype):
    """An offset of 300 and a spread of 3: sums of squares in bfloat16, or E[x^2] - E[x]^2, would be far off."""
    x = (300 + 3 * images(2, 4, 64)).astype(dtype)
    scale, bias = np.linspace(0.5, 2, 64, dtype=np.float32), np.linspace(-1, 1, 64, dtype=np.float32)
    y = GroupNorm(dtype).apply({"params": {"norm": {"scale": scale, "bias": bias}}}, x)
    groups = np.asarray(x.astype(jnp.float32), np.float64).reshape(2, 16, 32, 2)
    mean, var = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(2, 4, 4, 64) * scale + bias
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2e-4 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize(("kernel_size", "fan_in"), [(1, 64), (3, 576)])
def test_kernels_and_biases_start_uniform_within_the_fan_in(kernel_size, fan_in):
    conv = Conv(256, kernel_size=kernel_size)
    params = jax.jit(conv.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"]["conv"]
    for leaf in (params["kernel"], params["bias"]):
        assert 0.97 * fan_in**-0.5 < np.abs(leaf).max() <= fan_in**-0.5
    np.testing.assert_allclose(np.std(params["kernel"]), fan_in**-0.5 / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(np.mean(params["kernel"]), 0, atol=0.05 * fan_in**-0.5)


def products(module, x):
    """The precision of every convolution and matrix product of a module, gradient included."""
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    program = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(jnp.square(module.apply(params, x)))))(params)
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append(equation.params["precision"])
            for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    visit(getattr(value, "jaxpr", value))

    visit(program.jaxpr)
    return found


HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize("module", [Conv(32), ResBlock(64), AttentionBlock(), Downsample(), Upsample()])
def test_float32_products_are_at_highest_precision_and_bfloat16_ones_at_the_fastest(module):
    x = images(1, 4, 32)
    in_float32 = products(module, x)
    assert len(in_float32) >= 2
    assert set(in_float32) == {HIGHEST}
    assert HIGHEST not in products(module.clone(dtype=jnp.bfloat16), x.astype(jnp.bfloat16))


def test_encoder_levels():
    output, params = abstract(Encoder(32, MULT, 2, 8), images())
    assert output.shape == (2, 4, 4, 8)
    assert output.dtype == jnp.float32
    assert params["conv_in/conv/kernel"].shape == (3, 3, 3, 32)
    for level, channels in enumerate((32, 64, 32)):
        for i in range(2):
            assert params[f"level{level}_res{i}/conv2/conv/kernel"].shape == (3, 3, channels, channels)
            assert (f"level{level}_attention{i}/q/conv/kernel" in params) == (level == 2)
        assert f"level{level}_res2/conv1/conv/kernel" not in params
        assert (f"level{level}_downsample/conv/conv/kernel" in params) == (level < 2)
    assert "mid_attention/q/conv/kernel" in params
    assert params["conv_out/conv/kernel"].shape == (3, 3, 32, 8)


def test_decoder_levels():
    output, params = abstract(Decoder(32, MULT, 2), jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.float32))
    assert output.shape == (2, 16, 16, 3)
    assert params["conv_in/conv/kernel"].shape == (3, 3, 8, 32)
    for level, channels in enumerate((32, 64, 32)):
        for i in range(3):
            assert params[f"level{level}_res{i}/conv2/conv/kernel"].shape == (3, 3, channels, channels)
            assert (f"level{level}_attention{i}/q/conv/kernel" in params) == (level == 2)
        assert (f"level{level}_upsample/conv/conv/kernel" in params) == (level > 0)
    assert params["conv_out/conv/kernel"].shape == (3, 3, 32, 3)


@pytest.mark.parametrize("levels", [1, 3])
def test_downsampling_follows_the_levels(levels):
    output, _ = abstract(Encoder(32, (1,) * levels, 1, 8), images())
    assert output.shape == (2, 16 // 2 ** (levels - 1), 16 // 2 ** (levels - 1), 8)


def test_bfloat16_features_and_float32_pixels():
    features, params = abstract(Encoder(32, (1, 1), 1, 8, jnp.bfloat16), images())
    assert features.dtype == jnp.bfloat16
    pixels, more = abstract(Decoder(32, (1, 1), 1, jnp.bfloat16), features)
    assert pixels.dtype == jnp.float32
    assert {leaf.dtype for leaf in (params | more).values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize(("module", "blocks"), [(Encoder(32, (1,), 1, 8), 5), (Decoder(32, (1,), 1), 7)])
def test_remat_recomputes_blocks_and_changes_no_number(module, blocks):
    x = images(1, 4, 3 if isinstance(module, Encoder) else 8)
    params = jax.jit(module.init)(jax.random.key(0), x)

    def gradient(module):
        return jax.grad(lambda params: jnp.sum(jnp.square(module.apply(params, x))))

    def recomputed(module):
        return len(re.findall(r"\b(?:checkpoint|remat2?)\[", str(jax.make_jaxpr(module.apply)(params, x))))

    remat = module.clone(remat=True)
    assert recomputed(remat) == blocks
    assert recomputed(module) == 0
    assert jax.tree.structure(jax.eval_shape(remat.init, jax.random.key(0), x)) == jax.tree.structure(params)
    expected, actual = jax.jit(gradient(module))(params), jax.jit(gradient(remat))(params)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), actual, expected)


def test_decoder_shows_what_enters_its_last_layer():
    module = Decoder(32, (1,), 1)
    x = images(1, 4, 8)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    show = jax.jit(functools.partial(module.apply, mutable=["intermediates"]))
    pixels, captured = show({"params": params}, x)
    (features,) = captured["intermediates"]["last_features"]
    again = Conv(3).apply({"params": params["conv_out"]}, features)
    np.testing.assert_allclose(again, pixels, atol=1e-6)
