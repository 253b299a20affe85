import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.ops.code_usage import (
    code_histogram,
    code_statistics,
    level_statistics,
    perplexity,
    position_statistics,
    usage,
    usage_by_position,
)


def test_histogram_counts_like_bincount():
    codes = np.random.default_rng(0).integers(0, 37, (3, 5, 7)).astype(np.int32)
    counts = code_histogram(jnp.asarray(codes), 50)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.bincount(codes.ravel(), minlength=50))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_masked_elements_are_not_counted(axes):
    rng = np.random.default_rng(axes)
    codes = rng.integers(0, 6, (4, 3, 2)).astype(np.int32)
    mask = rng.random(codes.shape[:axes]) < 0.5
    assert mask.any()
    assert not mask.all()
    counts = jax.jit(code_histogram, static_argnums=1)(codes, 6, mask)
    np.testing.assert_array_equal(counts, np.bincount(codes[mask].ravel(), minlength=6))


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask \(3,\) must cover the leading axes of codes \(4, 3\)"):
        code_histogram(jnp.zeros((4, 3), jnp.int32), 6, jnp.ones(3, bool))


def test_codes_out_of_range_are_not_counted():
    counts = code_histogram(jnp.array([-1, -4, 0, 3, 4, 1000], jnp.int32), 4)
    np.testing.assert_array_equal(counts, [1, 0, 0, 1])


def test_sharded_codes_give_the_same_histogram():
    codes = np.random.default_rng(1).integers(0, 11, (16, 4, 4)).astype(np.int32)
    mask = np.arange(16) < 13
    mesh = jax.make_mesh((2, 4), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2)
    placement = NamedSharding(mesh, P(("data", "codebook")))
    histogram = jax.jit(code_histogram, static_argnums=1, out_shardings=NamedSharding(mesh, P()))
    counts = histogram(jax.device_put(codes, placement), 11, jax.device_put(mask, placement))
    np.testing.assert_array_equal(counts, np.bincount(codes[:13].ravel(), minlength=11))


def test_nothing_of_tokens_times_codes_is_built():
    shape = jax.ShapeDtypeStruct((4096,), jnp.int32)
    compiled = jax.jit(code_histogram, static_argnums=1).lower(shape, 65536).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 65536 / 100


@given(st.lists(st.integers(0, 20), min_size=0, max_size=60))
@settings(deadline=None, max_examples=25)
def test_histogram_adds_up_over_parts_of_a_window(codes):
    padded = np.array(codes + [-1] * (60 - len(codes)), np.int32)  # one shape, so one compilation
    counts = code_histogram(padded, 21)
    assert int(counts.sum()) == len(codes)
    np.testing.assert_array_equal(counts, code_histogram(padded[:25], 21) + code_histogram(padded[25:], 21))


@given(st.lists(st.integers(0, 1_000_000), min_size=12, max_size=12))
@settings(deadline=None, max_examples=50)
def test_perplexity_lies_between_one_and_the_codes_hit(counts):
    counts = np.array(counts, np.int32)
    hit = np.count_nonzero(counts)
    assert float(usage(counts)) == pytest.approx(hit / 12)
    value = float(perplexity(counts))
    assert min(1, hit) <= value <= hit
    if hit:
        frequency = counts[counts > 0] / counts.sum()
        assert value == pytest.approx(np.exp(-(frequency * np.log(frequency)).sum()), rel=1e-5)


@pytest.mark.parametrize("used", [1, 64, 262_144])
def test_uniform_use_of_a_large_codebook(used):
    counts = np.where(np.arange(262_144) < used, 50_000, 0).astype(np.int32)  # together more than an int32 holds
    assert float(perplexity(counts)) == pytest.approx(used, rel=1e-5)
    assert float(usage(counts)) == pytest.approx(used / 262_144)


def test_an_empty_window_has_no_usage_and_no_perplexity():
    counts = jnp.zeros(8, jnp.int32)
    assert float(usage(counts)) == 0.0
    assert float(perplexity(counts)) == 0.0


def test_codes_are_counted_by_position():
    counts, positions = np.array([2, 0, 5, 0, 1, 0]), np.array([0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(usage_by_position(counts, positions), [0.5, 0.5, 0.5])
    found = position_statistics(np.array([2, 0, 5, 7, 0, 0]), positions, "window/")
    assert found == {"positions/window/usage_min": 0, "positions/window/dead": 1}
    assert position_statistics(counts, np.zeros(6, int)) == {}


def test_every_level_has_its_usage_and_the_most_that_its_tokens_can_show():
    counts = np.array([[2, 0, 0, 0], [3, 3, 3, 3]])
    assert level_statistics(counts, (), 4) == {}
    found = level_statistics(counts, ("scale_1", "scale_2"), 4, "window/")
    assert found == pytest.approx(
        {
            "usage/window/scale_1": 0.25,
            "usage_most/window/scale_1": 0.5,
            "perplexity/window/scale_1": 1,
            "usage/window/scale_2": 1,
            "usage_most/window/scale_2": 1,
            "perplexity/window/scale_2": 4,
        }
    )


def test_levels_with_codes_of_their_own_are_measured_against_those():
    counts = np.array([[2, 0, 0, 0, 4, 0], [0, 3, 0, 3, 0, 0]])  # three codes each, which take turns
    found = level_statistics(counts, ("level_1", "level_2"), 3)
    assert found["usage/level_1"] == found["usage/level_2"] == pytest.approx(2 / 3)
    assert found["usage_most/level_1"] == 1
    shared, own = (code_statistics(counts.sum(axis=0), 2.0, choices) for choices in (6, 3))
    assert (shared["bits_per_pixel"], own["bits_per_pixel"]) == pytest.approx((np.log2(6) / 2, np.log2(3) / 2))
    told = shared["entropy_bits_per_pixel"] - own["entropy_bits_per_pixel"]
    assert told == pytest.approx(1 / 2)  # which of two levels, over two pixels
    assert shared["usage_if_uniform"] == own["usage_if_uniform"]
