import numpy as np
import pytest

from fvq_jax.ops.resize import resize_bicubic


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
