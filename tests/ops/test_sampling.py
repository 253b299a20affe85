import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from fvq_jax.ops.sampling import (
    draw,
    exponential_numbers,
    greedy,
    guidance_scales,
    guided,
    image_keys,
    keep_top_k,
    keep_top_p,
    random_words,
)

SAME = settings(max_examples=60, deadline=None, derandomize=True)
# Few different values, so that ties are common; all are exact in float32.
LOGITS = st_numpy.arrays(np.float32, (3, 20), elements=st.integers(-24, 24).map(lambda i: i / 4))


jit_draw, jit_top_k, jit_top_p = (jax.jit(program) for program in (draw, keep_top_k, keep_top_p))


def draws(logits, rows, position=7, **options):
    """A draw from the same logits for each of many images."""
    words = random_words(image_keys(1, jnp.arange(rows)), position)
    return np.asarray(jit_draw(jnp.broadcast_to(logits, (rows, len(logits))), words, **options))


def kept(logits):
    return np.isfinite(np.asarray(logits))


def oracle_top_k(logits, k):
    return logits >= np.sort(logits, axis=-1)[:, ::-1][:, k - 1 : k]


def before(logits):
    """The probability of all codes with larger logits, in float64."""
    logits = logits.astype(np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.sum(np.where(logits[:, None] > logits[:, :, None], shares[:, None], 0), axis=-1)


def test_constant_guidance_by_intervals():
    np.testing.assert_array_equal(guidance_scales(2.5, 5), np.full(5, 2.5, np.float32), strict=True)
    np.testing.assert_array_equal(guidance_scales(2.5, 5, interval=1), np.float32([2.5, 2.5, 2.5, 1, 1]))
    np.testing.assert_array_equal(guidance_scales(2.5, 5, interval=0), np.float32([2.5, 2.5, 1, 1, 1]))
    np.testing.assert_array_equal(guidance_scales(2.5, 5, interval=9), np.full(5, 2.5, np.float32))


@pytest.mark.parametrize("power", [1.0, 2.75])
def test_rising_guidance(power):
    p, length, scale = np.arange(16), 16, 4.0
    cosine = 1 + (scale - 1) * (1 - np.cos(np.pi * (p / length) ** power)) / 2
    np.testing.assert_allclose(guidance_scales(scale, length, "cosine", power=power), cosine, rtol=1e-6)
    np.testing.assert_allclose(guidance_scales(scale, length, "linear"), 1 + 3 * p / 15, rtol=1e-6)
    assert guidance_scales(scale, length, "cosine", interval=3)[5:].tolist() == [1] * 11
    assert guidance_scales(3.0, 1, "linear") == 1
    with pytest.raises(ValueError, match="must be one of constant, cosine, linear, not 'sine'"):
        guidance_scales(2.0, 4, "sine")


def test_guidance_goes_from_no_class_beyond_the_class():
    conditional, none = jnp.array([[1.1, -2.0]]), jnp.array([[0.3, 5.0]])
    np.testing.assert_allclose(guided(conditional, none, jnp.float32(2.5)), [[0.3 + 2.5 * 0.8, 5 - 2.5 * 7]], rtol=1e-6)
    np.testing.assert_array_equal(guided(conditional, none, jnp.float32(1)), conditional)
    np.testing.assert_array_equal(guided(conditional, jnp.full((1, 2), jnp.inf), jnp.float32(1)), conditional)


@SAME
@given(LOGITS, st.integers(1, 25))
def test_top_k_keeps_the_k_largest_and_those_equal_to_the_last_of_them(logits, k):
    np.testing.assert_array_equal(kept(jit_top_k(logits, k)), oracle_top_k(logits, min(k, 20)))


@SAME
@given(LOGITS, st.floats(0, 1, exclude_max=True, width=32))
def test_top_p_keeps_the_code_that_passes_p(logits, p):
    mass = before(logits)
    clear = np.abs(mass - p) > 1e-6  # elsewhere rounding decides
    found = kept(jit_top_p(logits, p))
    np.testing.assert_array_equal(found[clear], (mass <= p)[clear])
    assert found[logits == logits.max(-1, keepdims=True)].all()


def test_kept_logits_are_unchanged_and_both_zeros_are_equal():
    logits = np.float32([[0.0, -0.0, -1e-30, 3e38, -3e38]])
    np.testing.assert_array_equal(keep_top_k(logits, 2), np.float32([[0, 0, -np.inf, 3e38, -np.inf]]))
    np.testing.assert_array_equal(kept(keep_top_k(np.float32([[-np.inf, 1, 2]]), 3)), [[False, True, True]])


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_codes_come_as_often_as_their_probability_says(size):
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32) * 2
    expected = np.exp(logits) / np.exp(logits).sum()
    rows = 20000
    codes = draws(logits, rows)
    found = np.bincount(codes, minlength=size) / rows
    assert np.abs(found - expected).max() < 4.5 * np.sqrt(expected.max() / rows)
    assert 0.5 * np.abs(found - expected).sum() < np.sqrt(size / rows)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 2.0}])
def test_codes_come_as_often_as_the_cut_and_scaled_probability_says(options):
    logits, rows = np.log(np.float32([0.4, 0.25, 0.2, 0.1, 0.05])), 20000
    scaled = logits / options.get("temperature", 1.0)
    scaled[{"top_k": 3, "top_p": 4}.get(next(iter(options)), 5) :] = -np.inf  # 0.4 + 0.25 + 0.2 passes 0.7
    if "top_p" in options:
        scaled[3:] = -np.inf
    expected = np.exp(scaled) / np.exp(scaled).sum()
    found = np.bincount(draws(logits, rows, **options), minlength=5) / rows
    assert np.abs(found - expected).max() < 4.5 * np.sqrt(0.25 / rows)
    assert not found[expected == 0].any()


def test_draws_of_neighbouring_positions_and_images_are_independent():
    rows, size = 4000, 8
    first, second = (draws(np.zeros(size, np.float32), rows, position=position) for position in (0, 1))
    for a, b in ((first, second), (first[1:], first[:-1])):
        table = np.zeros((size, size))
        np.add.at(table, (a, b), 1)
        expected = len(a) / size**2
        assert np.sum((table - expected) ** 2 / expected) < 120  # chi-square of 63 degrees of freedom: 1 in 10^5


def test_exponential_numbers_have_the_distribution_and_are_different_for_every_code():
    words = random_words(image_keys(3, jnp.arange(4)), 0)
    numbers = np.asarray(exponential_numbers(words, 2**16))
    assert (numbers > 0).all()
    assert np.isfinite(numbers).all()
    for row in numbers:
        assert len(np.unique(row)) > 0.99 * row.size
        ordered = np.sort(row)
        distribution = (np.arange(row.size) + 0.5) / row.size
        assert np.abs(1 - np.exp(-ordered) - distribution).max() < 2 / np.sqrt(row.size)  # Kolmogorov-Smirnov
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.02


def test_rounding_of_logits_hardly_ever_changes_a_draw():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 1024)).astype(np.float32) * 2
    words = random_words(image_keys(0, jnp.arange(2000)), 0)
    noisy = logits + rng.normal(size=logits.shape).astype(np.float32) * 1e-5
    assert np.sum(np.asarray(jit_draw(logits, words)) != np.asarray(jit_draw(noisy, words))) <= 1


def test_greedy_takes_the_lowest_of_equal_codes():
    assert greedy(np.float32([[1, 3, 3], [2, 2, 1]])).tolist() == [1, 0]


def test_the_number_of_an_image_decides_its_randomness_and_not_its_place():
    all_keys = image_keys(5, jnp.arange(8))
    words = np.asarray(random_words(all_keys, 3))
    np.testing.assert_array_equal(random_words(image_keys(5, jnp.array([6, 1])), 3), words[[6, 1]])
    assert len(np.unique(np.concatenate([words, random_words(all_keys, 4)]), axis=0)[:, 0]) == 16
    assert not np.isin(words, random_words(image_keys(6, jnp.arange(8)), 3)).any()


def test_a_million_codes_are_cut_and_drawn_without_sorting():
    shape = jax.ShapeDtypeStruct((2, 2**20), jnp.float32)
    words = jax.ShapeDtypeStruct((2, 2), jnp.uint32)
    for options in ({}, {"top_k": 100, "top_p": 0.9}):
        assert (
            "stablehlo.sort"
            not in jax.jit(lambda z, w, options=options: draw(z, w, **options)).lower(shape, words).as_text()
        )
    assert "stablehlo.sort" in jax.jit(jnp.sort).lower(shape).as_text()
