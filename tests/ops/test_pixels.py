import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from fvq_jax.ops.pixels import to_float, to_uint8, to_unit

LEVELS = np.arange(256, dtype=np.uint8)


def test_every_8_bit_level_survives_the_way_to_the_model_and_back():
    pixels = to_float(jnp.asarray(LEVELS))
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels, LEVELS.astype(np.float64) / 127.5 - 1, atol=1e-7)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(pixels), LEVELS)


def test_metrics_see_every_level_as_its_part_of_the_whole_range():
    assert to_unit(LEVELS).dtype == jnp.float32
    np.testing.assert_allclose(to_unit(LEVELS), LEVELS / 255, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_rounding_and_clipping(dtype):
    x = np.array([-7.0, -1.0, -1.0 + 0.4 / 127.5, -1.0 + 0.6 / 127.5, 1.0, 1.2], np.float32)
    assert to_uint8(x.astype(dtype)).dtype == jnp.uint8
    expected = [0, 0, 0, 1, 255, 255] if dtype == np.float32 else [0, 0, 0, 0, 255, 255]
    np.testing.assert_array_equal(to_uint8(x.astype(dtype)), np.array(expected, np.uint8))
    np.testing.assert_array_equal(jax.jit(to_uint8)(x.astype(dtype)), np.array(expected, np.uint8))


def test_what_is_no_number_is_black_and_infinity_the_end_of_the_range():
    np.testing.assert_array_equal(to_uint8(np.array([np.nan, np.inf, -np.inf], np.float32)), [0, 255, 0])


@pytest.mark.parametrize("convert", [to_float, to_unit])
def test_floats_are_not_converted_twice(convert):
    with pytest.raises(TypeCheckError):
        convert(jnp.zeros((2, 2, 3)))


def test_truncation_differs_from_rounding_at_halves_alone():
    x = np.linspace(-1.1, 1.1, 4001, dtype=np.float32)
    truncated = np.asarray(to_uint8(x, "truncate"))
    np.testing.assert_array_equal(truncated, np.trunc(np.clip(np.float32(127.5) * x + 128, 0, 255)))
    assert np.mean(truncated == np.asarray(to_uint8(x))) > 0.99
    half = np.array([0.0], np.float32)  # level 127.5
    even = np.array([-1 / 127.5], np.float32)  # level 126.5
    assert [int(to_uint8(value, how)[0]) for value in (half, even) for how in ("round", "truncate")] == [
        *(128, 128),
        *(126, 127),
    ]
    with pytest.raises(ValueError, match="unknown rounding 'down'"):
        to_uint8(x, "down")
