import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.ibq import IBQuantizer
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import settings_of
from tests.helpers.quantizer_case import assert_same, random_latent, run, vector_weights
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of

K, D = 64, 8
WEIGHTS = {"index_weight": 0.9, "codebook_weight": 0.3, "commitment_weight": 0.8, "entropy_weight": 0.6}
OPTIONS = {"codebook_size": K, "code_dim": D, "entropy_temperature": 0.5, **WEIGHTS}


@functools.cache
def params(seed=1, k=K):
    codebook = np.random.default_rng(seed).normal(size=(k, D)).astype(np.float32)
    return {"codebook": jnp.asarray(codebook)}


def softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def through_softmax(p, to_p):
    """The gradient to logits, of that to probabilities."""
    return p * (to_p - (p * to_p).sum(axis=1, keepdims=True))


def oracle(latent, codebook, options):
    """Codes, loss terms, and the gradients of the whole loss to latents and codes; all logits at once, float64."""
    z, e = np.asarray(latent, np.float64).reshape(-1, D), np.asarray(codebook, np.float64)
    logits = z @ e.T
    codes = logits.argmax(axis=1)
    hard = np.eye(len(e))[codes]
    apart = hard @ e - z
    square = np.mean(apart**2)

    to_vectors = vector_weights(latent).reshape(-1, D) + options["index_weight"] * 2 * apart / z.size
    to_logits = through_softmax(softmax(logits), to_vectors @ e.T)
    to_codes = hard.T @ (to_vectors + options["codebook_weight"] * 2 * apart / z.size)
    to_latent = -(options["index_weight"] + options["commitment_weight"]) * 2 * apart / z.size

    p = softmax(logits / options["entropy_temperature"])
    mean = p.mean(axis=0)
    entropy = -(p * np.log(p)).sum(axis=1).mean() + (mean * np.log(mean + 1e-5)).sum()
    to_p = (-np.log(p) + (np.log(mean + 1e-5) + mean / (mean + 1e-5))[None]) / len(z)
    to_logits += options["entropy_weight"] / options["entropy_temperature"] * through_softmax(p, to_p)

    losses = {"index": square, "codebook": square, "commitment": square, "entropy": entropy}
    return codes, losses, (to_latent + to_logits @ e).reshape(latent.shape), to_codes + to_logits.T @ z


def test_codes_losses_and_gradients_equal_the_formula():
    latent = random_latent(D)
    output, (to_latent, to_params) = run(IBQuantizer(**OPTIONS), latent, params())
    codes, losses, wanted_latent, wanted_codes = oracle(latent, params()["codebook"], OPTIONS)
    assert len(np.unique(codes)) > 15
    np.testing.assert_array_equal(np.asarray(output.codes).ravel(), codes)
    np.testing.assert_array_equal(np.asarray(output.vectors).reshape(-1, D), params()["codebook"][codes])
    assert output.losses.keys() == losses.keys()
    for name, loss in losses.items():
        np.testing.assert_allclose(output.losses[name], loss, rtol=1e-5)
    np.testing.assert_allclose(to_latent, wanted_latent, atol=1e-5)
    np.testing.assert_allclose(to_params["codebook"], wanted_codes, atol=1e-5)
    unused = np.setdiff1d(np.arange(K), codes)
    assert np.all(np.abs(np.asarray(to_params["codebook"])[unused]).max(axis=1) > 1e-4)


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same(sizes):
    latent = random_latent(D)
    expected = run(IBQuantizer(**OPTIONS), latent, params())
    assert_same(run(IBQuantizer(**OPTIONS, mesh=mesh_of(*sizes)), latent, params()), expected)


def test_decoding_gives_exactly_the_vectors_of_every_code():
    latent = random_latent(D)
    quantizer = IBQuantizer(**OPTIONS)
    output, _ = run(quantizer, latent, params())
    np.testing.assert_array_equal(quantizer.apply({"params": params()}, output.codes, method="decode"), output.vectors)
    encoded = quantizer.apply({"params": params()}, jnp.asarray(latent), method="encode")
    np.testing.assert_array_equal(encoded, output.codes)
    with pytest.raises(ValueError, match="single level: leave upto out"):
        quantizer.apply({"params": params()}, output.codes, 1, method="decode")


def test_the_longest_of_codes_in_one_direction_is_chosen():
    """And not the nearest one; of equal codes the first."""
    codebook = jnp.array([[1.0, 0.0], [5.0, 0.0], [5.0, 0.0], [-9.0, 0.0]])
    quantizer = IBQuantizer(codebook_size=4, code_dim=2)
    latent = jnp.array([[[[1.0, 0.0], [-1.0, 0.0]]]])
    codes = quantizer.apply({"params": {"codebook": codebook}}, latent, method="encode")
    np.testing.assert_array_equal(codes[0, 0], [1, 3])


def test_defaults_and_a_fresh_codebook():
    quantizer = IBQuantizer(code_dim=D, codebook_size=4096)
    assert list(quantizer.loss_weights) == ["index", "codebook", "commitment", "entropy"]
    assert list(quantizer.loss_weights.values()) == [1.0, 0.25, 1.0, 0.05]
    assert (quantizer.size, quantizer.latent_dim, quantizer.entropy_temperature) == (4096, D, 0.01)
    fresh = quantizer.init(jax.random.key(0), jnp.zeros((1, 1, 1, D)))["params"]
    assert list(fresh) == ["codebook"]
    np.testing.assert_allclose(np.std(fresh["codebook"]), 1, rtol=0.02)
    assert list(IBQuantizer(**OPTIONS).loss_weights.values()) == [0.9, 0.3, 0.8, 0.6]


def test_without_a_weight_the_entropy_term_is_left_out_and_costs_nothing():
    def logarithms(**options):
        quantizer = IBQuantizer(**{**OPTIONS, **options})
        return str(jax.make_jaxpr(lambda z: quantizer.apply({"params": params()}, z))(random_latent(D))).count("log")

    assert logarithms(entropy_weight=0.0) == 0
    assert logarithms() > 0
    assert "entropy" not in IBQuantizer(**OPTIONS | {"entropy_weight": 0.0}).loss_weights


def test_a_bridge_makes_the_table_and_is_trained():
    quantizer = IBQuantizer(**OPTIONS, bridge="linear")
    rng = np.random.default_rng(3)
    layer = {"kernel": jnp.asarray(rng.normal(size=(D, D)) / 2, jnp.float32), "bias": jnp.zeros(D)}
    bridged = params() | {"bridge_net": {"linear0": layer}}
    latent = random_latent(D)
    output, (_, to_params) = run(quantizer, latent, bridged)
    table = np.asarray(params()["codebook"], np.float64) @ np.asarray(layer["kernel"], np.float64)
    codes, losses, _, to_table = oracle(latent, table, OPTIONS)
    np.testing.assert_array_equal(np.asarray(output.codes).ravel(), codes)
    np.testing.assert_allclose(output.losses["entropy"], losses["entropy"], rtol=1e-4)
    wanted = np.asarray(params()["codebook"], np.float64).T @ to_table
    np.testing.assert_allclose(to_params["bridge_net"]["linear0"]["kernel"], wanted, atol=1e-4)
    assert quantizer.foldable
    assert quantizer.description == "IBQ, bridge linear"
    folded = quantizer.folded()
    assert (folded.bridge, folded.entropy_weight, type(folded)) == ("none", 0.0, IBQuantizer)


@pytest.mark.parametrize("sizes", [None, (2, 4)])
def test_search_options_reach_the_search(sizes):
    mesh = None if sizes is None else mesh_of(*sizes)

    def lowered(platform="cpu", **options):
        quantizer = IBQuantizer(**OPTIONS, mesh=mesh, **options)
        encode = jax.jit(lambda z, params: quantizer.apply({"params": params}, z, method="encode"))
        return encode.trace(random_latent(D), params()).lower(lowering_platforms=(platform,)).as_text()

    assert "bf16" in lowered(search_precision="bf16")
    assert "bf16" not in lowered()
    assert "tpu_custom_call" in lowered("tpu")
    assert "tpu_custom_call" not in lowered("tpu", search_implementation="xla")


def test_a_tree_finds_no_inner_products():
    with pytest.raises(InputError, match="must be one of auto, xla, not 'tree'"):
        settings_of(IBQuantizer)["search_implementation"].check("search_implementation", "tree")


def test_settings_that_do_not_fit_are_refused_with_what_would():
    with pytest.raises(ValueError, match=r"mesh.codebook 3 does not divide the 64 codes .*allowed sizes: 1, 2, 4"):
        IBQuantizer(**OPTIONS).check(3)
    with pytest.raises(ValueError, match="unknown bridge 'M/4'"):
        IBQuantizer(**OPTIONS, bridge="M/4").check()
    IBQuantizer(**OPTIONS).check(8)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.05])
def test_flops_of_the_streamed_losses_are_not_counted(entropy_weight):
    """Of the losses 4,096 codes are eight blocks, of the search 64, and of each loop XLA counts one."""
    quantizer = IBQuantizer(codebook_size=4096, code_dim=D, entropy_weight=entropy_weight, search_precision="bf16")
    product, losses = 2 * 100 * 4096 * D, (12 if entropy_weight else 6) * 7 / 8
    assert quantizer.uncounted_flops(100, "cpu") == (pytest.approx(product * (62 / 64 + losses)), 1)
    flops, passes = quantizer.uncounted_flops(100, "tpu")
    assert flops == pytest.approx(product * (1 + losses))
    assert passes == pytest.approx((1 + 6 * losses) / (1 + losses))
