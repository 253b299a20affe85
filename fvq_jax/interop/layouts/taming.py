"""VQGAN as taming-transformers saves it (arXiv 2012.09841): a Lightning checkpoint, or its weights alone."""

from collections.abc import Mapping
from typing import Any

from fvq_jax.interop.layouts.conv_names import VQGAN_CONVS
from fvq_jax.interop.layouts.fvq import infer_vector
from fvq_jax.interop.layouts.layout import Layout
from fvq_jax.interop.layouts.quantizer_names import BOOK
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import require

# Perceptual loss and discriminator; colours of segmentations; the statistics of a codebook that is a moving average.
TRAINING = r"loss\..*|colorize|quantize\.embedding\.(cluster_size|embed_avg)"


def _check(net: TokenizerNet, params: Mapping[str, Any]) -> None:
    assert isinstance(net.quantizer, VectorQuantizer)
    require(
        not net.quantizer.l2_normalize,
        'the layout "taming" has no codes of unit length, and this tokenizer has: use layout="llamagen", or none',
    )


TAMING = Layout(
    name="taming",
    title="VQGAN of taming-transformers",
    convs=VQGAN_CONVS,
    quantizer="vector",
    infer_quantizer=infer_vector,
    marks=(r"encoder\.down\.", r"quantize\.embedding\.weight"),
    absent=(r"quantize\.quant_resi\.", r"quantize\.qbridge\.", r"model_ema\."),
    quantizer_names=rf"quantize\.{BOOK}",
    unread=TRAINING,
    check=_check,
    wrapper="state_dict",
)
