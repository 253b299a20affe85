import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from fvq_jax.ops.sampling import (
    draw,
    greedy,
    guidance_scales,
    guided,
    image_keys,
    keep_top_k,
    keep_top_p,
    uniform_numbers,
)

SAME = settings(max_examples=60, deadline=None, derandomize=True)
# Few different values, so that ties are common; all are exact in float32.
LOGITS = st_numpy.arrays(np.float32, (3, 20), elements=st.integers(-24, 24).map(lambda i: i / 4))


jit_draw, jit_top_k, jit_top_p = (jax.jit(program) for program in (draw, keep_top_k, keep_top_p))


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


@SAME
@given(LOGITS, st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=3, max_size=3), st.floats(0.25, 4))
def test_the_code_is_the_one_whose_part_of_the_interval_holds_the_number(logits, numbers, temperature):
    scaled = logits.astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max(-1, keepdims=True))
    ends = np.cumsum(shares / shares.sum(-1, keepdims=True), axis=-1)
    codes = np.asarray(jit_draw(logits, np.float32(numbers), temperature=temperature))
    for row, number, code in zip(ends, numbers, codes, strict=True):
        begin = row[code - 1] if code else 0
        assert begin - 2e-6 <= number <= row[code] + 2e-6


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_codes_come_as_often_as_their_probability_says(size):
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32) * 2
    expected = np.exp(logits) / np.exp(logits).sum()
    rows = 20000
    numbers = uniform_numbers(image_keys(1, jnp.arange(rows)), 7)
    codes = jax.jit(draw)(jnp.broadcast_to(logits, (rows, size)), numbers)
    found = np.bincount(codes, minlength=size) / rows
    assert np.abs(found - expected).max() < 4.5 * np.sqrt(expected.max() / rows)
    assert 0.5 * np.abs(found - expected).sum() < np.sqrt(size / rows)


def test_what_was_cut_off_is_never_drawn_whatever_the_number():
    logits = np.full((4, 300), -np.inf, np.float32)
    logits[:, [130, 140, 299]] = [1.0, 1.0, -60.0]
    numbers = np.float32([0, 0.5, 1 - 2**-24, 0.49999997])
    assert set(np.asarray(jit_draw(logits, numbers)).tolist()) <= {130, 140, 299}
    assert np.asarray(jit_draw(logits, numbers, top_k=2)).tolist() == [130, 140, 140, 130]
    assert np.asarray(jit_draw(logits, numbers, top_p=0.4)).tolist() == [130, 140, 140, 130]  # equal ones stay together
    logits[:, 140] = 0.9
    assert np.asarray(jit_draw(logits, numbers, top_p=0.4)).tolist() == [130] * 4
    assert np.asarray(jit_draw(logits, numbers, top_k=1)).tolist() == [130] * 4


def test_top_p_sees_what_top_k_has_left_at_the_temperature():
    logits = np.log(np.float32([[0.5, 0.3, 0.15, 0.05]]))
    number = np.float32([1 - 2**-24])
    assert jit_draw(logits, number, top_k=3, top_p=0.8) == 1  # 0.5 + 0.3 is 0.84 of the three that are left
    assert jit_draw(logits, number, top_p=0.8001) == 2
    assert jit_draw(logits, number, temperature=0.25, top_p=0.8) == 0  # 0.5^4 is 0.88 of all


def test_greedy_takes_the_lowest_of_equal_codes():
    assert greedy(np.float32([[1, 3, 3], [2, 2, 1]])).tolist() == [1, 0]


def test_the_number_of_an_image_decides_its_randomness_and_not_its_place():
    all_keys = image_keys(5, jnp.arange(8))
    numbers = np.asarray(uniform_numbers(all_keys, 3))
    np.testing.assert_array_equal(uniform_numbers(image_keys(5, jnp.array([6, 1])), 3), numbers[[6, 1]])
    assert len({*numbers.tolist(), *np.asarray(uniform_numbers(all_keys, 4)).tolist()}) == 16
    assert not np.isin(numbers, uniform_numbers(image_keys(6, jnp.arange(8)), 3)).any()


def test_a_million_codes_are_cut_and_drawn_without_sorting():
    shape = jax.ShapeDtypeStruct((2, 2**20), jnp.float32)
    number = jax.ShapeDtypeStruct((2,), jnp.float32)
    for options in ({}, {"top_k": 100, "top_p": 0.9}):
        assert (
            "stablehlo.sort"
            not in jax.jit(lambda z, u, options=options: draw(z, u, **options)).lower(shape, number).as_text()
        )
    assert "stablehlo.sort" in jax.jit(jnp.sort).lower(shape).as_text()
