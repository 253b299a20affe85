"""LlamaGen's VQ tokenizers (arXiv 2406.06525)."""

import dataclasses

from fvq_jax.interop.layouts.fvq import FVQ
from fvq_jax.interop.layouts.quantizer_names import BOOK

LLAMAGEN = dataclasses.replace(
    FVQ,
    name="llamagen",
    title="LlamaGen tokenizer",
    marks=(r"encoder\.conv_blocks\.",),
    absent=(r"quantize\.qbridge\.",),
    quantizer_names=rf"quantize\.{BOOK}",
    bridged=False,
    check=lambda net, params: None,
)
