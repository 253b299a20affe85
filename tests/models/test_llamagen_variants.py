"""The down-sampling variants of LlamaGen's tokenizer (arXiv 2406.06525): shapes and sizes, without computing."""

import math

import jax
import jax.numpy as jnp
import pytest

from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet


@pytest.mark.parametrize(
    ("ch_mult", "factor", "millions"),
    [((1, 2, 2, 4), 8, 70), ((1, 1, 2, 2, 4), 16, 72), ((1, 1, 2, 2, 4, 4), 32, None)],
)
def test_grid_and_parameters(ch_mult, factor, millions):
    quantizer = VectorQuantizer(codebook_size=16384, code_dim=8, bridge="none", l2_normalize=True)
    net = TokenizerNet(quantizer, ch=128, ch_mult=ch_mult, num_res_blocks=2, z_channels=256)
    images = jax.ShapeDtypeStruct((2, 256, 512, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    output = jax.eval_shape(net.apply, variables, images)
    assert output.quantized.codes.shape == (2, 256 // factor, 512 // factor)
    assert output.quantized.vectors.shape == (2, 256 // factor, 512 // factor, 8)
    assert output.reconstruction.shape == images.shape
    if millions is not None:  # the published sizes
        assert round(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) / 1e6) == millions
