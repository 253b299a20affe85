"""IBQ (arXiv 2412.02692): VQGAN's tensors and a moving average of them, which is what is evaluated, so it is read.

Without a moving average the tensors are those of a VQGAN, and the layout must be named.
"""

import dataclasses

from fvq_jax.interop.layouts.quantizer_names import infer_book
from fvq_jax.interop.layouts.taming import TAMING
from fvq_jax.interop.lightning import averages
from fvq_jax.models.quantizers.ibq import IBQuantizer

IBQ = dataclasses.replace(
    TAMING,
    name="ibq",
    title="IBQ tokenizer",
    quantizer="ibq",
    infer_quantizer=lambda evidence, said: IBQuantizer(**infer_book(evidence, "quantize.")),
    marks=(*TAMING.marks, r"model_ema\."),
    absent=(r"quantize\.quant_resi\.", r"quantize\.qbridge\."),
    beside=lambda net, tensors: averages(tensors),
    check=lambda net, params: None,
    facts=lambda net: {"layout": "ibq"},
)
