import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.adversarial import ADVERSARIAL_LOSSES, discriminator_loss, generator_loss
from tests.helpers.golden64 import in_float32, in_float64
from tests.helpers.golden_case import load_case, relative_error


def test_losses_equal_the_published_ones():
    expected, exact = load_case("adversarial_losses").outputs, in_float64("adversarial_losses")
    rounded = in_float32("adversarial_losses")
    terms = load_case("adversarial_losses").inputs["real"].size
    assert set(exact) == set(expected)
    for name, value in exact.items():
        assert (value.dtype, rounded[name].dtype) == (np.float64, np.float32)
        assert relative_error(value, expected[name]) < 1e-6, name
        assert relative_error(rounded[name], value) < terms * 2**-24, name  # the most that a sum can lose


def test_non_saturating_is_the_binary_cross_entropy_of_the_wanted_label():
    rng = np.random.default_rng(0)
    real, fake = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    discriminator = -0.5 * (np.log(sigmoid(real)).mean() + np.log(1 - sigmoid(fake)).mean())
    np.testing.assert_allclose(discriminator_loss("non_saturating", real, fake), discriminator, rtol=1e-5)
    np.testing.assert_allclose(generator_loss("non_saturating", fake), -np.log(sigmoid(fake)).mean(), rtol=1e-5)


def test_each_kind_is_its_own_pair_of_losses():
    real, fake = jnp.array([0.5, -3.0]), jnp.array([0.2, -1.5])
    pairs = {(float(discriminator_loss(k, real, fake)), float(generator_loss(k, fake))) for k in ADVERSARIAL_LOSSES}
    assert len(pairs) == len(ADVERSARIAL_LOSSES) == 3


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_gradients_push_logits_the_right_way(kind):
    real, fake = jnp.zeros(4), jnp.zeros(4)
    to_real, to_fake = jax.grad(discriminator_loss, argnums=(1, 2))(kind, real, fake)
    assert (to_real < 0).all()
    assert (to_fake > 0).all()
    assert (jax.grad(generator_loss, argnums=1)(kind, fake) < 0).all()


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_losses_are_float32_and_finite_for_huge_bfloat16_logits(kind):
    logits = jnp.array([300.0, -300.0], jnp.bfloat16)
    for loss in (discriminator_loss(kind, logits, logits), generator_loss(kind, logits)):
        assert loss.dtype == jnp.float32
        assert jnp.isfinite(loss)


@pytest.mark.parametrize("loss", [lambda k, x: discriminator_loss(k, x, x), generator_loss])
def test_an_unknown_kind_names_the_known_ones(loss):
    with pytest.raises(ValueError, match="'wasserstein'; known: hinge, vanilla, non_saturating"):
        loss("wasserstein", jnp.zeros(2))
