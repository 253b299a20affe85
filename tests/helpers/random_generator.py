"""Tiny generators with random weights, for the codes of `random_tokenizer`."""

import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.inference.saved_generator import Provenance, SavedGenerator
from fvq_jax.models.gpt import GPT


def tiny_gpt(**changes) -> GPT:
    """Two layers of width 32, 4 x 4 codes out of 64, 10 classes; `changes` are of its arguments."""
    return GPT(**{"vocab": 64, "classes": 10, "grid": (4, 4), "layers": 2, "width": 32, "heads": 4} | changes)


def random_gpt_params(net: GPT, seed: int = 0) -> dict:
    """Weights with which logits differ clearly between codes, positions and classes; on the host."""
    rng = np.random.default_rng(seed)
    codes = jax.ShapeDtypeStruct((1, net.length), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1,), jnp.int32), codes)["params"]

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith("norm"):
            return 1 + np.float32(0.1) * noise
        scale = 1.0 if name.endswith("embedding") else net.width**-0.5
        return np.float32(scale) * noise

    return jax.tree.map_with_path(value, shapes)


def random_generator(seed: int = 0, provenance: Provenance | None = None, **changes) -> SavedGenerator:
    """`tiny_gpt` with random weights."""
    net = tiny_gpt(**changes)
    return SavedGenerator(net, random_gpt_params(net, seed), provenance or Provenance())
