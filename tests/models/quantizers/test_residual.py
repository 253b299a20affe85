import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.residual import ResidualQuantizer
from tests.helpers.golden_case import relative_error

K, D, DEPTH = 40, 6, 3
OWN = 39  # codes, of which every level has 13


def make(**options):
    return ResidualQuantizer(**{"codebook_size": K, "code_dim": D, "bridge": "none", "depth": DEPTH, **options})


@functools.cache
def case():
    """Latents [2, 3, 5, d] and a table with codes of many lengths."""
    rng = np.random.default_rng(1)
    latent, table = rng.normal(size=(2, 3, 5, D)), rng.normal(size=(K, D)) * np.geomspace(0.2, 1.5, K)[:, None]
    return jnp.float32(latent), jnp.float32(table)


@functools.cache
def oracle():
    """Codes [n, depth], the sums [depth, n, d], and the gradient of the codebook loss by the table; float64."""
    latent, table = (np.float64(array) for array in case())
    tokens = latent.reshape(-1, D)
    codes, sums = np.zeros((len(tokens), DEPTH), int), np.zeros((DEPTH, len(tokens), D))
    gradient = np.zeros_like(table)
    for token, z in enumerate(tokens):
        chosen = []
        for level in range(DEPTH):
            total = sum((table[code] for code in chosen), np.zeros(D))
            chosen.append(min(range(K), key=lambda code: np.linalg.norm(z - total - table[code])))
            sums[level, token] = total + table[chosen[-1]]
            # The mean over levels, tokens and channels of a square: all codes chosen so far are pulled alike.
            for code in chosen:
                gradient[code] += 2 * (sums[level, token] - z) / tokens.size / DEPTH
        codes[token] = chosen
    return codes, sums, gradient


@functools.cache
def found():
    """The output, and the gradient of the codebook loss by the table."""

    def loss(codebook, latent):
        output = make().apply({"params": {"codebook": codebook}}, latent)
        return output.losses["codebook"], output

    gradient, output = jax.jit(jax.grad(loss, has_aux=True))(case()[1], case()[0])
    return output, gradient


@functools.cache
def own_codes():
    """The output where every level has codes of its own."""
    latent, table = case()
    quantizer = make(codebook_size=OWN, shared_codebook=False)
    return jax.jit(quantizer.apply)({"params": {"codebook": table[:OWN]}}, latent)


def test_each_level_is_the_code_nearest_to_what_is_left():
    (codes, sums, _), (output, _) = oracle(), found()
    assert output.codes.shape == (2, 3, 5, DEPTH)
    np.testing.assert_array_equal(output.codes.reshape(-1, DEPTH), codes)
    np.testing.assert_allclose(output.vectors.reshape(-1, D), sums[-1], atol=1e-5)
    error = np.mean([np.mean(np.square(case()[0].reshape(-1, D) - total)) for total in sums])
    np.testing.assert_allclose(list(output.losses.values()), error, rtol=1e-5)
    assert len(np.unique(codes)) > 10


def test_a_code_is_pulled_by_its_own_level_and_all_later_ones():
    assert relative_error(found()[1], oracle()[2]) < 1e-5
    unused = np.setdiff1d(np.arange(K), oracle()[0])
    assert not np.any(found()[1][unused])


@pytest.mark.parametrize("upto", [1, 2, 3, None])
def test_decoding_adds_up_the_first_levels(upto):
    codes, sums, _ = oracle()
    codes = jnp.asarray(codes.reshape(2, 3, 5, DEPTH), jnp.int32)
    vectors = make().apply({"params": {"codebook": case()[1]}}, codes, upto, method="decode")
    np.testing.assert_allclose(vectors.reshape(-1, D), sums[-1 if upto is None else upto - 1], atol=1e-5)


def test_levels_with_codes_of_their_own_choose_from_those():
    latent, table = (np.float64(array) for array in case())
    rest, codes = latent.reshape(-1, D), np.asarray(own_codes().codes).reshape(-1, DEPTH)
    for level in range(DEPTH):
        own = np.arange(level, OWN, DEPTH)
        nearest = np.square(rest[:, None] - table[own]).sum(-1).argmin(1)
        np.testing.assert_array_equal(codes[:, level], own[nearest])
        rest = rest - table[codes[:, level]]
    vectors = own_codes().vectors.reshape(-1, D)
    np.testing.assert_allclose(vectors, latent.reshape(-1, D) - rest, atol=1e-5)
    quantizer = make(codebook_size=OWN, shared_codebook=False)
    assert (quantizer.size, quantizer.choices, make().choices) == (OWN, OWN // DEPTH, K)
    assert quantizer.description == "bridge none, 3 levels of 13 codes each"
    assert quantizer.uncounted_flops(100, "tpu") == (2 * 100 * OWN // DEPTH * D, 6)
    decoded = quantizer.apply({"params": {"codebook": case()[1][:OWN]}}, own_codes().codes, 1, method="decode")
    np.testing.assert_array_equal(decoded, case()[1][own_codes().codes[..., 0]])


def test_codes_that_cannot_be_divided_among_levels_are_refused():
    own = functools.partial(make, shared_codebook=False)
    own(codebook_size=48).check(8)
    with pytest.raises(
        ValueError, match=r"codebook_size 40 is not a multiple of depth 3, so .* or use shared_codebook=True"
    ):
        own().check()
    with pytest.raises(ValueError, match=r"mesh.codebook 12 does not divide the 8 codes of each level"):
        own(codebook_size=24).check(12)
    with pytest.raises(ValueError, match=r"restart_after puts codes .*: use restart_after=0 or shared_codebook=True"):
        own(codebook_size=48, restart_after=1.0).check()
    with pytest.raises(ValueError, match="a single level has all codes"):
        own(depth=1).check()
    assert "shared_codebook" in own().architecture()


def test_the_depth_is_the_number_of_codes_per_latent():
    latent, table = case()
    deeper = jax.jit(lambda x: make(depth=5).apply({"params": {"codebook": table}}, x, method="encode"))(latent)
    assert deeper.shape == (2, 3, 5, 5)
    np.testing.assert_array_equal(deeper[..., :DEPTH], found()[0].codes)
    assert make(depth=5).code_shape(2, 3) == (2, 3, 5)


def test_the_grid_follows_from_the_shape_of_codes():
    assert make().grid((2, 5, 3)) == (2, 5)
    for shape in ((2, 5), (2, 5, 4), (0, 5, 3)):
        with pytest.raises(ValueError, match=r"codes must be \[b, h, w, 3\]"):
            make().grid(shape)


def test_it_is_described_by_its_sizes_bridge_and_depth():
    assert make().description == "bridge none, 3 levels"
    expected = {"codebook_size": K, "code_dim": D, "bridge": "none", "depth": DEPTH}
    assert make().architecture() == expected
    weights = make(codebook_weight=0.5, commitment_weight=0.1).loss_weights
    assert weights == {"codebook": 0.5, "commitment": 0.1}


def test_there_is_one_table_and_every_code_is_a_search():
    """Tokens are codes of any level."""
    params = make(bridge="linear").init(jax.random.key(0), jnp.zeros((1, 1, 1, D)))["params"]
    assert set(params) == {"codebook", "bridge_net"}
    assert make(bridge="linear").apply({"params": params}, method="table").shape == (K, D)
    assert make(codebook_size=4096).uncounted_flops(100, "tpu") == (2 * 100 * 4096 * D, 6)


def test_a_mesh_that_does_not_fit_is_refused():
    make().check(8)
    with pytest.raises(ValueError, match=r"mesh.codebook 3 does not divide the 40 codes"):
        make().check(3)


def test_codes_and_vectors_are_those_of_the_package_that_is_used_most():
    """vector-quantize-pytorch's losses differ: it compares every level with what is left for it, not the sums."""
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("vector_quantize_pytorch")
    latent, _ = case()
    for shared in (True, False):
        table = case()[1] if shared else case()[1][:OWN]
        peer = published.ResidualVQ(
            dim=D,
            num_quantizers=DEPTH,
            codebook_size=K if shared else OWN // DEPTH,
            shared_codebook=shared,
            learnable_codebook=True,
            ema_update=False,
        )
        for level, layer in enumerate(peer.layers):
            book = table if shared else table[level::DEPTH]
            layer._codebook.embed.data.copy_(torch.from_numpy(np.array(book))[None])
        peer.eval()
        quantized, codes, _ = peer(torch.from_numpy(np.array(latent).reshape(2, 15, D)))
        output = found()[0] if shared else own_codes()
        numbered = codes.numpy() if shared else codes.numpy() * DEPTH + np.arange(DEPTH)
        np.testing.assert_array_equal(np.asarray(output.codes).reshape(2, 15, DEPTH), numbered)
        np.testing.assert_allclose(np.asarray(output.vectors).reshape(2, 15, D), quantized.detach().numpy(), atol=1e-5)
