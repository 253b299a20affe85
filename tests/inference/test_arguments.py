import functools

import jax
import numpy as np
import pytest

from fvq_jax.inference.generator import Generator
from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.ops.pixels import to_float
from fvq_jax.runtime.errors import InputError
from tests.helpers.random_generator import random_generator
from tests.helpers.random_tokenizer import random_tokenizer


@functools.cache
def tokenizer():
    return Tokenizer(random_tokenizer(bridge="XS/2"))


def pictures(n):
    return np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 15, 16, 3), np.uint8), r"15 x 16 pixels do not fit the down-sampling of 2: .* instance 16 x 16"),
        (np.zeros((1, 0, 16, 3), np.uint8), r"0 x 16 pixels do not fit.* instance 2 x 16"),
        (np.zeros((16, 16, 3), np.uint8), r"must be \[b, H, W, 3\], not \[16, 16, 3\]"),
        (np.zeros((1, 3, 16, 16), np.uint8), r"must be \[b, H, W, 3\], not \[1, 3, 16, 16\]"),
        (np.zeros((1, 16, 16, 3), np.int32), "must be uint8, or floating-point in .*, not int32"),
        (np.full((1, 16, 16, 3), 255.0), r"must be in \[-1, 1\], not from 255 to 255"),
        (np.full((1, 16, 16, 3), np.nan), r"must be in \[-1, 1\], not from nan to nan"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused_in_one_line(images, message):
    with pytest.raises(InputError, match=message):
        tokenizer().encode(images)


def test_the_range_of_floating_point_images_is_said_or_doubted():
    tok, pixels = tokenizer(), pictures(2)
    codes = tok.encode(pixels)
    for low, high in ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (-0.5, 0.5)):
        images = np.asarray(pixels, np.float64) / 255 * (high - low) + low
        for found in (tok.encode, lambda *args, **how: tok.reconstruct(*args, **how).codes):
            assert np.mean(found(images, value_range=(low, high)) == codes) > 0.98  # ties are broken by rounding
    with pytest.warns(UserWarning, match=r"no value .* below 0 .*give value_range=\(0, 1\) if that is meant"):
        tok.encode(pixels / np.float32(255))
    with pytest.raises(InputError, match=r"must be in \[0, 1\], not from 0 to 255 .*value_range"):
        tok.encode(np.linspace(0, 255, 768).reshape(1, 16, 16, 3), value_range=(0, 1))
    with pytest.raises(InputError, match=r"value_range must be black and white, such as \(0, 1\), not \(1, 0\)"):
        tok.encode(pixels / np.float32(255), value_range=(1, 0))
    with pytest.raises(InputError, match=r"\(the channels come last\)"):
        tok.encode(pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((8, 8), np.int32), r"must be \[b, h, w\], not \[8, 8\]"),
        (np.zeros((1, 8, 8), np.float32), r"must be whole numbers, not float32"),
        (np.full((1, 8, 8), 64), r"must be in 0\.\.63, and these are from 64 to 64"),
        (np.full((1, 8, 8), -1), r"must be in 0\.\.63, and these are from -1 to -1"),
    ],
)
def test_codes_that_cannot_be_decoded_are_refused_in_one_line(codes, message):
    with pytest.raises(InputError, match=message):
        tokenizer().decode(codes)


def test_codes_of_another_level_are_refused():
    saved = random_tokenizer(bridge="none")
    own = ResidualQuantizer(codebook_size=64, code_dim=8, bridge="none", depth=2, shared_codebook=False)
    tok = Tokenizer(SavedTokenizer(saved.net.clone(quantizer=own), saved.params))
    codes = np.stack([np.full((1, 8, 8), 6), np.full((1, 8, 8), 9)], axis=-1)
    assert tok.decode(codes).shape == (1, 16, 16, 3)
    with pytest.raises(
        InputError, match=r"code j of level l, both counted from 0, is number 2 j \+ l: multiply by 2, and"
    ):
        tok.decode(codes // 2)


def test_inside_a_compiled_function_the_network_itself_is_called():
    tok, images = tokenizer(), pictures(2)
    with pytest.raises(InputError, match=r'images are being traced .*call tokenizer.net.apply.*method="encode"'):
        jax.jit(tok.encode)(images)
    with pytest.raises(InputError, match="codes are being traced"):
        jax.jit(tok.decode)(np.zeros((1, 8, 8), np.int32))
    inside = jax.jit(lambda params, images: tok.net.apply({"params": params}, images, method="encode"))
    found = inside(tok.params, to_float(jax.numpy.asarray(images)))
    np.testing.assert_array_equal(found, tok.encode(images))


def test_a_generator_takes_no_traced_labels():
    with pytest.raises(InputError, match=r"labels are being traced by jax.jit or the like.*outside the compiled"):
        jax.jit(Generator(random_generator()).sample_codes)(np.zeros(1, np.int32))
