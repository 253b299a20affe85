"""Tiny tokenizers with random weights whose codes are spread, for the tests of files and programs."""

import math

import jax
import numpy as np

from fvq_jax.inference.saved import SavedTokenizer
from fvq_jax.interop.named_tensors import abstract_params
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet

NETWORK = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "z_channels": 16}


def tiny_net(**changes) -> TokenizerNet:
    """Down-sampling 2, 64 codes of dimension 8, no bridge; `changes` are of the network or of its vector quantizer."""
    names = [*NETWORK, "dtype", "attention_levels"]
    network = {**NETWORK, **{name: changes.pop(name) for name in names if name in changes}}
    return TokenizerNet(VectorQuantizer(**{"codebook_size": 64, "code_dim": 8, "bridge": "none"} | changes), **network)


def random_tokenizer(seed: int = 0, **changes) -> SavedTokenizer:
    """`tiny_net` with random weights."""
    net = tiny_net(**changes)
    return SavedTokenizer(net, random_params(net, seed))


def random_params(net: TokenizerNet, seed: int = 0) -> dict:
    """Weights of every kind that keep activations at their scale; codes differ."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith("/kernel"):
            return noise / np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
        if name.endswith("/scale"):
            return 1 + np.float32(0.1) * noise
        return noise if "codebook" in name or "embedding" in name else np.float32(0.05) * noise

    return jax.tree.map_with_path(value, abstract_params(net))
