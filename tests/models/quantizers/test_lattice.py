"""What all quantizers without a table have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.models.quantizers import make_quantizer, quantizer_settings
from fvq_jax.models.quantizers.bsq import BSQuantizer
from fvq_jax.models.quantizers.fsq import FSQuantizer
from fvq_jax.models.quantizers.lfq import LFQuantizer
from tests.helpers.quantizer_case import random_latent, run

QUANTIZERS = [FSQuantizer(levels=(8, 5, 4)), LFQuantizer(bits=6), BSQuantizer(bits=6)]
each = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: type(quantizer).__name__)


@each
def test_decoding_gives_exactly_the_vectors_of_every_code(quantizer):
    latent = random_latent(quantizer.latent_dim, scale=3)
    output, _ = run(quantizer, latent)
    assert (output.vectors.dtype, output.codes.dtype) == (jnp.float32, jnp.int32)
    assert output.codes.shape == (8, *quantizer.code_shape(2, 3))
    assert len(np.unique(output.codes)) > 20
    decode = jax.jit(lambda codes: quantizer.apply({}, codes, method="decode"))
    np.testing.assert_array_equal(decode(output.codes), output.vectors)
    np.testing.assert_array_equal(quantizer.apply({}, jnp.asarray(latent), method="encode"), output.codes)
    everything = np.asarray(decode(jnp.arange(quantizer.size).reshape(1, 1, -1)))[0, 0]
    assert len(np.unique(everything, axis=0)) == quantizer.size


@each
def test_there_is_no_table_nothing_to_train_and_nothing_to_fold(quantizer):
    assert quantizer.init(jax.random.key(0), jnp.zeros((1, 1, 1, quantizer.latent_dim))) == {}
    assert quantizer.apply({}, method="table") is None
    assert not quantizer.foldable
    assert quantizer.folded() == quantizer
    assert quantizer.classes == 0
    with pytest.raises(ValueError, match="no classes: leave condition out"):
        quantizer.apply({}, 0, method="table")
    with pytest.raises(ValueError, match="single level: leave upto out"):
        quantizer.apply({}, jnp.zeros((1, 1, 1), jnp.int32), 1, method="decode")


@each
def test_codes_are_counted(quantizer):
    counts = quantizer.counts(jnp.array([[[0, 1, 1]]]))
    assert counts.shape == (1, quantizer.size)
    np.testing.assert_array_equal(counts[0, :3], [1, 2, 0])


@each
def test_any_axis_fits(quantizer):
    for axis in (1, 3, 8):
        quantizer.check(axis)


@each
def test_it_is_made_from_its_settings_and_they_from_it(quantizer):
    settings = quantizer_settings(quantizer)
    assert make_quantizer(settings) == quantizer
    # As read from JSON, which has no tuples.
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    assert make_quantizer(lists) == quantizer
    assert quantizer.architecture().items() <= settings.items()


@pytest.mark.parametrize("kind", [LFQuantizer, BSQuantizer])
def test_codes_of_many_bits_are_exact(kind):
    quantizer = kind()
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2**18, (4, 5, 100)), jnp.int32).at[0, 0, 0].set(2**18 - 1)
    vectors = quantizer.apply({}, codes, method="decode")
    np.testing.assert_array_equal(quantizer.apply({}, vectors, method="encode"), codes)


@pytest.mark.parametrize("kind", [LFQuantizer, BSQuantizer])
def test_too_many_bits_are_refused(kind):
    kind(bits=24).check()
    for bits in (0, 25):
        with pytest.raises(ValueError, match=f"bits {bits} must be between 1 and 24"):
            kind(bits=bits).check()


@pytest.mark.parametrize("kind", [LFQuantizer, BSQuantizer])
def test_without_a_weight_the_entropy_term_is_left_out_and_costs_nothing(kind):
    latent = random_latent(6)

    def logarithms(**options):
        program = jax.make_jaxpr(lambda z: kind(bits=6, **options).apply({}, z).losses)(latent)
        return str(program).count("log")

    assert logarithms(entropy_weight=0.0) == 0
    assert logarithms(entropy_weight=0.1) > 0
    assert "entropy" not in kind(bits=6, entropy_weight=0.0).loss_weights
    assert kind(bits=6, entropy_weight=0.3).loss_weights["entropy"] == 0.3
