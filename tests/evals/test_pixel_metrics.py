import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from skimage import data
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from fvq_jax.evals.pixel_metrics import l1, mse, psnr, ssim


def picture_pairs(height=40, width=53):
    """Crops of a photograph against noisy, shifted, constant and equal ones."""
    rng = np.random.default_rng(0)
    photograph = data.astronaut().astype(np.float32) / 255
    crops = np.stack([photograph[y : y + height, y + 9 : y + 9 + width] for y in (0, 90, 200, 300)])
    noisy = np.clip(crops[0] + rng.normal(0, 0.08, crops[0].shape), 0, 1)
    others = np.stack([noisy, np.roll(crops[1], 2, axis=1), np.ones_like(crops[2]), crops[3]])
    flat = np.stack([np.full_like(crops[0], 1.0), np.full_like(crops[0], 0.98)])[:, None]
    return np.concatenate([crops, flat[0]]), np.concatenate([others, flat[1]]).astype(np.float32)


def test_ssim_agrees_with_scikit_image():
    a, b = picture_pairs()
    expected = [
        structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
        )
        for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True)
    ]
    np.testing.assert_allclose(jax.jit(ssim)(a, b), expected, atol=1e-4)


def test_psnr_mse_and_l1_agree_with_their_definitions():
    a, b = (x[:3] for x in picture_pairs())
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    pairs = list(zip(wide_a, wide_b, strict=True))
    np.testing.assert_allclose(psnr(a, b), [peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs], rtol=1e-5)
    np.testing.assert_allclose(mse(a, b), [mean_squared_error(x, y) for x, y in pairs], rtol=1e-5)
    np.testing.assert_allclose(l1(a, b), [np.abs(x - y).mean() for x, y in pairs], rtol=1e-5)


def test_identical_images():
    a, _ = picture_pairs()
    np.testing.assert_allclose(psnr(a, a), 120.0, rtol=1e-6)
    np.testing.assert_allclose(ssim(a, a), 1.0, atol=1e-6)
    np.testing.assert_array_equal(l1(a, a), 0.0)


def test_bfloat16_images_are_compared_in_float32():
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in picture_pairs())
    for metric in (l1, mse, psnr, ssim):
        result = metric(a, b)
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, metric(a.astype(jnp.float32), b.astype(jnp.float32)))


def test_metrics_are_symmetric_and_per_image():
    a, b = picture_pairs()
    for metric in (l1, mse, psnr, ssim):
        np.testing.assert_allclose(metric(a, b), metric(b, a), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metric(a, b)[1:2], metric(a[1:2], b[1:2]), rtol=1e-5, atol=1e-6)


def test_smallest_images_ssim_can_score():
    a, b = picture_pairs(11, 12)
    assert ssim(a, b).shape == (5,)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 12"):
        ssim(a[:, :10], b[:, :10])


def test_shapes_must_agree():
    a, b = picture_pairs()
    for metric in (l1, mse, psnr, ssim):
        with pytest.raises((ValueError, TypeCheckError)):
            metric(a[:1], b)  # would broadcast


def test_images_stay_on_their_devices():
    """Of a batch that a mesh divides, every device scores its own images: nothing travels."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = jax.sharding.NamedSharding(mesh, jax.P("batch"))
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32, sharding=layout)
    for metric in (l1, mse, psnr, ssim):
        program = jax.jit(metric, out_shardings=layout).lower(images, images).compile().as_text()
        assert "all-" not in program, metric.__name__
