import math

import jax
import numpy as np
import pytest

from fvq_jax.ops.resize import resize_area, resize_bicubic


@pytest.mark.parametrize("sides", [(12, 8), (8, 12), (9, 9), (384, 256)])
def test_it_resizes_as_pytorch_does(sides):
    torch = pytest.importorskip("torch")
    before, after = sides
    images = np.random.default_rng(0).uniform(-1, 1, (2, before, before + 3, 3)).astype(np.float32)
    channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    expected = torch.nn.functional.interpolate(channels_first, size=(after, after), mode="bicubic")
    found = resize_bicubic(images, after, after)
    np.testing.assert_allclose(found, np.moveaxis(expected.numpy(), 1, -1), atol=2e-5)
    assert np.abs(found).max() > 1  # not cut off at the range of the pixels


def test_even_areas_stay_as_they_are():
    np.testing.assert_allclose(resize_bicubic(np.full((1, 9, 6, 3), 0.25, np.float32), 6, 4), 0.25, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(8, 3), (7, 2), (16, 13), (6, 3)])
def test_areas_are_means_of_all_pixels_they_touch(before, after):
    images = np.random.default_rng(0).uniform(-1, 1, (2, before, before + 3, 3)).astype(np.float32)

    def parts(side):
        return [slice(i * side // after, math.ceil((i + 1) * side / after)) for i in range(after)]

    rows, columns = parts(before), parts(before + 3)
    expected = np.array([[images[:, y, x].mean(axis=(1, 2)) for x in columns] for y in rows]).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(resize_area(images, after, after), expected, atol=1e-6)


@pytest.mark.parametrize("sides", [(8, 3), (13, 10), (9, 9)])
def test_areas_are_those_of_pytorch(sides):
    torch = pytest.importorskip("torch")
    before, after = sides
    images = np.random.default_rng(0).uniform(-1, 1, (2, before, before, 3)).astype(np.float32)
    channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    expected = torch.nn.functional.interpolate(channels_first, size=(after, after), mode="area")
    np.testing.assert_allclose(resize_area(images, after, after), np.moveaxis(expected.numpy(), 1, -1), atol=1e-6)


@pytest.mark.parametrize("resize", [resize_area, resize_bicubic])
def test_the_same_size_changes_nothing(resize):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize(images, 5, 4), images)
    assert "dot_general" not in str(jax.make_jaxpr(lambda x: resize(x, 5, 4))(images))
