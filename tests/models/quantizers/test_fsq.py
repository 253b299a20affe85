import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers.fsq import FSQuantizer
from tests.helpers.quantizer_case import assert_same, random_latent, run, vector_weights
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of

LEVELS = (8, 6, 5, 3)


def squashed(z, levels):
    """Eq. 2 of arXiv 2309.15505 and its derivative, float64."""
    z, levels = np.asarray(z, np.float64), np.asarray(levels)
    half, offset = (levels - 1) * 0.999 / 2, np.where(levels % 2, 0, 0.5)
    t = np.tanh(z + np.arctanh(offset / half))
    return t * half - offset, (1 - t * t) * half


def oracle(z, levels):
    """Codes, vectors, and the gradient of the vectors to the latents."""
    value, slope = squashed(z, levels)
    half = np.asarray(levels) // 2
    numbers = np.round(value).astype(int) + half
    codes = np.zeros(z.shape[:-1], int)
    for i in reversed(range(len(levels))):
        codes = codes * levels[i] + numbers[..., i]
    return codes, (numbers - half) / half, slope / half


@pytest.mark.parametrize("levels", [LEVELS, (8,) * 6])
def test_codes_vectors_and_gradient_equal_the_formula(levels):
    latent = random_latent(len(levels), scale=2)
    output, (to_latent, _) = run(FSQuantizer(levels=levels), latent)
    codes, vectors, slope = oracle(latent, levels)
    np.testing.assert_array_equal(output.codes, codes)
    np.testing.assert_allclose(output.vectors, vectors, rtol=1e-6)
    np.testing.assert_allclose(to_latent, slope * vector_weights(latent), rtol=1e-3, atol=1e-5)
    assert output.losses == {}


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same(sizes):
    latent = random_latent(4, scale=2)
    expected = run(FSQuantizer(levels=LEVELS), latent)
    assert_same(run(FSQuantizer(levels=LEVELS, mesh=mesh_of(*sizes)), latent), expected)


@pytest.mark.parametrize("level", [3, 4, 5, 8, 255])
def test_each_level_is_reached_and_zero_stays_zero(level):
    quantizer = FSQuantizer(levels=(level,))
    z = jnp.linspace(-9, 9, 4001)[:, None][None, None]
    codes = np.asarray(quantizer.apply({}, z, method="encode")).ravel()
    np.testing.assert_array_equal(np.unique(codes), np.arange(level))
    assert np.all(np.diff(codes) >= 0)
    assert quantizer.apply({}, jnp.zeros((1, 1, 1, 1))).vectors == 0
    vectors = quantizer.apply({}, jnp.arange(level)[None, None], method="decode").ravel()
    np.testing.assert_allclose(vectors, (np.arange(level) - level // 2) / (level // 2), rtol=1e-6)


def test_the_first_channel_counts_one():
    vectors = FSQuantizer(levels=(8, 5)).apply({}, jnp.array([[[4 + 8 * 2, 5 + 8 * 2, 4 + 8 * 3]]]), method="decode")
    np.testing.assert_array_equal(vectors[0, 0], [[0, 0], [0.25, 0], [0, 0.5]])


def test_published_levels_and_what_it_says_of_itself():
    quantizer = FSQuantizer()
    assert (quantizer.size, quantizer.latent_dim) == (15_360, 5)
    assert quantizer.description == "FSQ, levels 8 8 8 6 5"
    assert quantizer.loss_weights == {}
    for levels, size in (((8, 8, 8, 5, 5, 5), 64_000), ((8,) * 6, 2**18)):
        assert FSQuantizer(levels=levels).size == size
        FSQuantizer(levels=levels).check()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "must be whole numbers of 3 or more, for instance"),
        ((8, 2), r"levels \(8, 2\) must be whole numbers of 3 or more"),
        ((1000, 1000, 1000), "make 1000000000 codes: use fewer or smaller ones with a product of at most 16777216"),
    ],
)
def test_levels_that_do_not_work_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        FSQuantizer(levels=levels).check()


def test_equals_vector_quantize_pytorch():
    """It widens the range by MARGIN where the paper narrows it, so that values next to a middle may differ."""
    library = pytest.importorskip("vector_quantize_pytorch")
    torch = pytest.importorskip("torch")
    latent = random_latent(4, scale=2)
    vectors, codes = library.FSQ(list(LEVELS))(torch.from_numpy(latent.reshape(1, -1, 4)))
    output, _ = run(FSQuantizer(levels=LEVELS), latent)
    value, _ = squashed(latent, LEVELS)
    clear = np.abs(value - np.floor(value) - 0.5).min(axis=-1).ravel() > 0.02
    assert clear.mean() > 0.7
    np.testing.assert_array_equal(np.asarray(output.codes).ravel()[clear], codes.numpy().ravel()[clear])
    ours = np.asarray(output.vectors).reshape(-1, 4)
    np.testing.assert_allclose(ours[clear], vectors.detach().numpy()[0][clear], rtol=1e-6)


def test_codes_do_not_depend_on_the_program():
    latent = random_latent(4, scale=2)
    quantizer = FSQuantizer(levels=LEVELS)
    compiled = jax.jit(lambda z: quantizer.apply({}, z, method="encode"))(latent)
    np.testing.assert_array_equal(compiled, run(quantizer, latent)[0].codes)
