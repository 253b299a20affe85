import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fvq_jax.interop.layouts.fvq import FVQ
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet, fold
from fvq_jax.runtime.names import path_name
from tests.helpers.golden64 import (
    ALLOWED,
    PYTORCH_ROUNDING,
    in_float32,
    in_float64,
    published_net,
    rounding_errors,
    summation_error,
)
from tests.helpers.golden_case import load_case, relative_error
from tests.helpers.slow_cases import slow

GOLDEN_CASES = ("fvq_vit", "fvq_dit", "fvq_linear", "llamagen_l2")
MOST_CASES = ["fvq_vit", "fvq_dit", *slow("fvq_linear"), "llamagen_l2"]
K = 100  # codes of the tiny network; no other axis of it has this size


@pytest.mark.parametrize("name", MOST_CASES)
def test_every_output_equals_the_published_one(name):
    expected, actual = load_case(name).outputs, in_float64(name)
    assert {value.dtype.name for value in actual.values()} == {"float64", "int32"}
    np.testing.assert_array_equal(actual["indices"].reshape(-1), expected["indices"].reshape(-1))
    for output in ("latent", "codebook", "quantized", "reconstruction"):
        if output in expected:
            assert relative_error(actual[output], expected[output]) < 1e-5, output
    for loss in ("vq_loss", "commit_loss", "entropy_loss", "loss"):
        np.testing.assert_allclose(actual[loss], expected[loss], rtol=1e-5, err_msg=loss)


@pytest.mark.parametrize("name", MOST_CASES)
def test_the_gradient_of_every_parameter_equals_the_published_one(name):
    expected, actual = load_case(name).outputs, in_float64(name)
    norms = {key.removeprefix("gradnorm/"): float(x) for key, x in expected.items() if key.startswith("gradnorm/")}
    grads = {key.removeprefix("grad/"): x for key, x in actual.items() if key.startswith("grad/")}
    not_trained = grads.pop("quantize.qbridge.pos_embed", np.zeros(1))
    assert (not_trained == 0).all()
    assert set(grads) == set(norms)
    for key, norm in norms.items():
        # Biases of keys, and those that a norm of one channel per group takes away again, have gradient zero in
        # exact arithmetic; the published ones are rounding, of the size of 1e-7 of the same layer's weight gradient.
        rounding = 1e-6 * norms[key.replace(".bias", ".weight")]
        np.testing.assert_allclose(np.linalg.norm(grads[key]), norm, rtol=1e-3, atol=rounding, err_msg=key)
    for key in ("quantize.embedding.weight", "encoder.conv_in.weight", "decoder.conv_out.bias"):
        assert relative_error(grads[key], expected[f"grad/{key}"]) < 1e-3, key


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_an_independent_module_computes_the_same_in_float64(name):
    """And its float32 is as far from that as is written down, by which ours is judged."""
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_golden

    actual, expected = in_float64(name), torch_golden.compute(name, torch.float64)
    np.testing.assert_array_equal(actual["indices"], expected["indices"])
    for loss in ("vq_loss", "commit_loss", "entropy_loss", "loss"):
        np.testing.assert_allclose(actual[loss], expected[loss], rtol=1e-12, err_msg=loss)
    errors = rounding_errors(actual, expected)
    assert errors["forward"] < 1e-12
    assert errors["gradients"] < 1e-9
    for part, error in torch_golden.rounding(name, rounding_errors).items():
        assert 0.25 < error / PYTORCH_ROUNDING[name][part] < 4, part


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_float32_rounds_no_more_than_pytorch_does(name):
    actual, expected = in_float32(name), in_float64(name)
    assert {value.dtype.name for value in actual.values()} == {"float32", "int32"}
    # No latent is near enough to the border between two codes for float32 to move it across.
    np.testing.assert_array_equal(actual["indices"], expected["indices"])
    assert least_gap(expected, load_case(name).config["l2_norm"]) > 20 * 2**-24
    for part, error in rounding_errors(actual, expected).items():
        assert error < ALLOWED * PYTORCH_ROUNDING[name][part], part
    for loss in ("vq_loss", "commit_loss", "entropy_loss", "loss"):
        terms = expected["reconstruction"].size
        np.testing.assert_allclose(actual[loss], expected[loss], rtol=summation_error(terms), err_msg=loss)


def least_gap(results, l2_norm):
    """Least difference of a latent's two shortest distances to codes, over |z|^2 + max |e|^2."""
    table = results["codebook"]
    latent = np.moveaxis(results["latent"], 1, -1).reshape(-1, table.shape[1])
    if l2_norm:
        latent = latent / np.linalg.norm(latent, axis=1, keepdims=True)
    first, second = np.sort(np.square(latent[:, None] - table[None]).sum(-1), axis=1)[:, :2].T
    return np.min((second - first) / (np.square(latent).sum(1) + np.square(table).sum(1).max()))


def test_a_folded_bridge_gives_the_published_codes_and_reconstruction():
    case = load_case("fvq_vit")
    net = published_net(case.config)
    params = jax.tree.map(jnp.asarray, FVQ.params(case.weights, net, "the case"))
    plain, folded = fold(net, {"params": params})
    assert plain.quantizer.bridge == "none"
    assert set(plain.quantizer.loss_weights) == {"codebook", "commitment"}
    assert set(folded["params"]["quantizer"]) == {"codebook"}
    output = jax.jit(plain.apply)(folded, case.images())
    np.testing.assert_array_equal(output.quantized.codes.reshape(-1), case.outputs["indices"].reshape(-1))
    reconstruction = np.moveaxis(np.asarray(output.reconstruction), -1, 1)
    assert relative_error(reconstruction, case.outputs["reconstruction"]) < 1e-4


# --- options, on the smallest network ---------------------------------------------------------------------------


def tiny_net(**changes):
    of_quantizer = {"codebook_size": K, "code_dim": 4, "bridge": "XS/2"}
    of_network = {"ch": 32, "ch_mult": (1,), "num_res_blocks": 1, "z_channels": 8, "dtype": jnp.float32}
    of_network |= {name: changes.pop(name) for name in ("dtype", "remat") if name in changes}
    quantizer = VectorQuantizer(**(of_quantizer | changes), dtype=of_network["dtype"])
    return TokenizerNet(quantizer, **of_network)


def tiny_images():
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)


@functools.cache
def tiny_params(bridge="XS/2"):
    """Random parameters with which every layer matters, the bridge's last one included, and codes differ."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name, x = path_name(path), rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("kernel"):
            x *= np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray({"scale": 1 + 0.1 * x, "bias": 0.05 * x}.get(name.rpartition("/")[2], x))

    shapes = jax.eval_shape(tiny_net(bridge=bridge).init, jax.random.key(0), tiny_images())["params"]
    return jax.tree.map_with_path(fill, shapes)


def program(net, params=None, method=None):
    """The equations of a method (the forward pass if None) as one flat list; those of loops and calls included."""
    params = tiny_params() if params is None else params
    inputs = () if method == "table" else (tiny_images(),)
    equations = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            equations.append(equation)
            inner = jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"))
            for value in inner:
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    visit(getattr(value, "jaxpr", value))

    visit(jax.make_jaxpr(functools.partial(net.apply, method=method))({"params": params}, *inputs).jaxpr)
    return equations


@pytest.mark.parametrize(
    ("bridge", "l2_normalize"), [("XS/2", False), pytest.param("linear", True, marks=pytest.mark.slow)]
)
def test_each_method_agrees_with_the_forward_pass(bridge, l2_normalize):
    net, variables = tiny_net(bridge=bridge, l2_normalize=l2_normalize), {"params": tiny_params(bridge)}

    @jax.jit
    def methods(images):
        output = net.apply(variables, images)
        codes = net.apply(variables, images, method="encode")
        decoded = net.apply(variables, codes, method="decode")
        return output, codes, decoded, net.apply(variables, method="table")

    output, codes, decoded, table = methods(tiny_images())
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == jnp.int32
    assert len(np.unique(codes)) > 3
    np.testing.assert_array_equal(codes, output.quantized.codes)
    np.testing.assert_allclose(table[codes], output.quantized.vectors, atol=1e-6)
    np.testing.assert_allclose(decoded, output.reconstruction, rtol=0, atol=1e-5)
    lengths = np.linalg.norm(table, axis=1)
    assert np.allclose(lengths, 1, atol=1e-6) == l2_normalize


@pytest.mark.parametrize(
    ("bridge", "l2_normalize"), [pytest.param("linear", False, marks=pytest.mark.slow), ("XS/2", True)]
)
def test_folding_changes_neither_codes_nor_pictures(bridge, l2_normalize):
    net, params = tiny_net(bridge=bridge, l2_normalize=l2_normalize), tiny_params(bridge)
    plain, folded = fold(net, {"params": params})
    before = jax.jit(net.apply)({"params": params}, tiny_images())
    after = jax.jit(plain.apply)(folded, tiny_images())
    np.testing.assert_array_equal(before.quantized.codes, after.quantized.codes)
    np.testing.assert_allclose(before.reconstruction, after.reconstruction, rtol=0, atol=1e-5)


def test_groups_of_the_bridge_are_as_asked():
    tables = [
        tiny_net(bridge_groups=groups).apply({"params": tiny_params()}, method="table") for groups in ("2d", "1d")
    ]
    assert np.abs(tables[0] - tables[1]).max() > 1e-3


@pytest.mark.slow
def test_remat_recomputes_and_changes_no_number():
    def total(params, remat):
        output = tiny_net(remat=remat).apply({"params": params}, tiny_images())
        return jnp.mean(jnp.square(output.reconstruction - tiny_images())) + output.quantized.losses["commitment"]

    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, remat=remat)))(tiny_params()) for remat in (False, True)
    ]
    (loss, grads), (loss_remat, grads_remat) = results
    np.testing.assert_allclose(loss_remat, loss, rtol=1e-6)
    assert optax.tree.norm(optax.tree.sub(grads_remat, grads)) < 1e-5 * optax.tree.norm(grads)

    def recomputed(remat):
        names = [equation.primitive.name for equation in program(tiny_net(remat=remat))]
        return sum(name in ("checkpoint", "remat", "remat2") for name in names)

    # Encoder: 3 residual blocks and 2 attentions; decoder: 4 and 3.
    assert recomputed(remat=False) == 0
    assert recomputed(remat=True) == 3 + 2 + 4 + 3


def test_bfloat16_computes_in_bfloat16_and_keeps_what_must_be_exact_in_float32():
    net = tiny_net(dtype=jnp.bfloat16, entropy_weight=0.1)
    made = jax.eval_shape(net.init, jax.random.key(0), tiny_images())["params"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made)} == {"float32"}
    output = jax.eval_shape(net.apply, {"params": made}, tiny_images())
    floats = [leaf for leaf in jax.tree.leaves(output) if leaf.dtype != jnp.int32]
    assert {leaf.dtype.name for leaf in floats} == {"float32"}
    assert len(floats) == 7  # reconstruction, vectors, three losses, quantization error and what it is a part of

    def operands(primitive, method=None):
        equations = [e for e in program(net, method=method) if e.primitive.name == primitive]
        return [e.invars[0].aval.dtype.name for e in equations]

    convolutions = operands("conv_general_dilated")
    assert convolutions.count("float32") == 3  # quant_conv, post_quant_conv, and the one that makes pixels
    assert convolutions.count("bfloat16") == len(convolutions) - 3 > 20
    products = operands("dot_general", "table")
    assert products.count("float32") == 1  # recover
    assert products.count("bfloat16") == 1 + 2 * 6  # compress; in each block four layers and the attention's two


@pytest.mark.slow
def test_bfloat16_moves_latents_codes_and_pictures_only_a_little():
    vectors = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))

    def parts(net):
        return net.encode_latent(tiny_images()), net.table(), net.decode_vectors(vectors)

    exact, rounded = (
        jax.jit(functools.partial(tiny_net(dtype=dtype).apply, method=parts))({"params": tiny_params()})
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == jnp.float32
        assert 1e-5 < relative_error(b, a) < 3e-2


def test_the_entropy_term_costs_nothing_when_it_is_off():
    def softmax_over_codes(weight):
        equations = program(tiny_net(entropy_weight=weight))
        return any(e.primitive.name == "exp" and e.outvars[0].aval.shape[-1:] == (K,) for e in equations)

    assert "entropy" not in jax.eval_shape(tiny_net().apply, {"params": tiny_params()}, tiny_images()).quantized.losses
    assert not softmax_over_codes(0.0)
    assert softmax_over_codes(0.01)


def test_a_mesh_is_handed_to_the_search():
    mesh = jax.make_mesh((1, 2), ("data", "codebook"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:2])
    names = [e.primitive.name for e in program(tiny_net(mesh=mesh))]
    assert "shard_map" in names
    assert "shard_map" not in [e.primitive.name for e in program(tiny_net())]
