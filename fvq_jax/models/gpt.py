"""The generator's network: LlamaGen's class-conditional transformer over codes (arXiv 2406.06525).

The sequence is [class, code 0, ..., code t-2], and the output at position p predicts code p of a grid read row by row.
The parameters of all layers are stacked along a first axis, so that a scan compiles one layer. The functions of one
layer are shared with `gpt_cache`, which decodes with a cache of keys and values. The loss is left to `ops.token_loss`.

Parameters are float32; matrix products are in `dtype`; the residual stream, norms, rotations and softmax are float32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.ops.causal_attention import causal_attention
from fvq_jax.ops.matmul import matmul, matmul_precision
from fvq_jax.ops.sharded_codebook import sharded_lookup
from fvq_jax.runtime.mesh import BATCH, Rules

Layer = Mapping[str, Any]  # the parameters of one layer, or of all layers along a first axis
HIDDEN_MULTIPLE = 256  # the width of a feed-forward network is rounded up to a multiple of it

_NORMAL = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Size:
    """What distinguishes the published sizes."""

    layers: int
    width: int
    heads: int


SIZES = {
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(36, 1280, 20),
    "XXL": Size(48, 1536, 24),
    "3B": Size(24, 3200, 32),
}


def hidden_width(width: int) -> int:
    """The width of the feed-forward networks: 8/3 of the model's, rounded up to a multiple of 256."""
    return -(-(8 * width // 3) // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


def rotations(grid: tuple[int, int], head_width: int, base: float = 10000.0) -> Float[np.ndarray, "2 t p"]:
    """Cosines and sines of the rotation of every pair of channels at every position, p = head_width / 2.

    The first half of the pairs rotates by the row of a code's own cell, the second half by its column. At position 0,
    the class, both are zero: keys and queries of the class vanish there, as in the published code.
    """
    quarter = head_width // 4
    frequencies = base ** (-np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = np.indices(grid).reshape(2, -1, 1) * frequencies
    angles = np.concatenate([rows, columns], axis=-1)[:-1]  # the last code is never an input
    found = np.stack([np.cos(angles), np.sin(angles)])
    return np.pad(found, ((0, 0), (1, 0), (0, 0))).astype(np.float32)


def rotate(x: Float[Array, "b t h c"], cos: Float[Array, "t p"], sin: Float[Array, "t p"]) -> Float[Array, "b t h c"]:
    """Rotates the pairs of channels (0, 1), (2, 3), ... by the angles of their positions; computed in float32."""
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    cos, sin = cos[None, :, None], sin[None, :, None]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, "d"], eps: float) -> Float[Array, "*b d"]:
    """Root-mean-square normalisation; computed and returned in float32."""
    x = x.astype(jnp.float32)
    weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def queries_keys_values(
    layer: Layer,
    x: Float[Array, "b t d"],
    cos: Float[Array, "t p"],
    sin: Float[Array, "t p"],
    *,
    heads: int,
    eps: float,
    dtype: DTypeLike,
) -> tuple[Any, Any, Any]:
    """Rotated queries and keys, and values, each [b, t, heads, head_width] in `dtype`."""
    normed = rms_norm(x, layer["attention_norm"], eps).astype(dtype)
    mixed = matmul(normed, layer["wqkv"]).reshape(*x.shape[:2], 3, heads, -1)
    queries, keys, values = jnp.moveaxis(mixed, 2, 0)
    return rotate(queries, cos, sin), rotate(keys, cos, sin), values


def feed_forward(layer: Layer, x: Float[Array, "b t d"], *, eps: float, dtype: DTypeLike) -> Float[Array, "b t d"]:
    """The gated feed-forward network of one layer, without the residual connection; in `dtype`."""
    normed = rms_norm(x, layer["ffn_norm"], eps).astype(dtype)
    return matmul(nn.silu(matmul(normed, layer["w1"])) * matmul(normed, layer["w3"]), layer["w2"])


class Layers(nn.Module):
    """The parameters of all layers; calling it returns them, each with a first axis of `layers`."""

    layers: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """{"wqkv": [n, d, 3d], "wo": [n, d, d], "w1": [n, d, f], "w3": [n, d, f], "w2": [n, f, d], and both norms}."""
        n, d, f = self.layers, self.width, self.hidden
        matrices = {"wqkv": (n, d, 3 * d), "wo": (n, d, d), "w1": (n, d, f), "w3": (n, d, f), "w2": (n, f, d)}
        norms = dict.fromkeys(("attention_norm", "ffn_norm"), (n, d))
        return {
            **{name: self.param(name, _NORMAL, shape, jnp.float32) for name, shape in matrices.items()},
            **{name: self.param(name, nn.initializers.ones, shape, jnp.float32) for name, shape in norms.items()},
        }


class GPT(nn.Module):
    """Class and codes to hidden states, from which the loss and the logits follow.

    Attributes:
      vocab: how many codes there are.
      classes: how many classes there are; the class after the last one means "no class".
      grid: rows and columns of the codes of an image; t = rows x columns.
      layers, width, heads: see `SIZES`.
      hidden: width of the feed-forward networks; 0: `hidden_width(width)`.
      dropout: of the embeddings, and of what attention and feed-forward network add.
      class_dropout: how often a class is replaced by "no class" in training.
      path_dropout: how often the last layer adds nothing to an image, in training; it grows linearly from 0 at the
        first layer. If it is above 0, it replaces the dropout inside the layers.
      rope_base, eps: of the rotations and of the norms.
      dtype: of the matrix products.
      remat: recompute layers in the backward pass, to save memory.
      unroll: compile all layers one after the other instead of one in a loop. That takes longer, and a CPU is then
        faster: it need not copy a layer's parameters out of the stack in every pass.
      mesh: a mesh with axes `data` and `codebook`, over which parameters (see `rules`) and batch are divided.
    """

    vocab: int
    classes: int
    grid: tuple[int, int]
    layers: int
    width: int
    heads: int
    hidden: int = 0
    dropout: float = 0.1
    class_dropout: float = 0.1
    path_dropout: float = 0.0
    rope_base: float = 10000.0
    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    unroll: bool = False
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Makes the parameters."""
        self.cls_embedding = self.param("cls_embedding", _NORMAL, (self.classes + 1, self.width), jnp.float32)
        self.tok_embedding = self.param("tok_embedding", _NORMAL, (self.vocab, self.width), jnp.float32)
        self.blocks = Layers(self.layers, self.width, self.hidden or hidden_width(self.width), name="layers")
        self.norm = self.param("norm", nn.initializers.ones, (self.width,), jnp.float32)
        self.output = self.param("output", nn.initializers.zeros, (self.vocab, self.width), jnp.float32)

    @property
    def length(self) -> int:
        """Codes of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def __call__(
        self,
        labels: Int[Array, "b"],
        codes: Int[Array, "b t"],
        *,
        train: bool = False,
        key: Shaped[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Hidden states after the last norm, float32; the state at position p predicts code p.

        Args:
          labels: from 0 to `classes`, which means "no class".
          codes: all codes of an image in reading order; the last one is not looked at.
          train: whether anything is dropped.
          key: for what is dropped; needed if `train`.
        """
        drop_class: Any = None
        drop_input: Any = None
        drop_layers: Any = None
        if train:
            if key is None:
                raise ValueError("training drops classes and entries at random, and needs a key")
            drop_class, drop_input, drop_layers = jax.random.split(key, 3)
            if self.class_dropout > 0:
                none = jax.random.bernoulli(drop_class, self.class_dropout, labels.shape)
                labels = jnp.where(none, self.classes, labels)
        x = jnp.concatenate([self._class_vectors(labels), self._code_vectors(codes[:, :-1])], axis=1)
        x = self._batch(x)
        if train:
            x = dropped(x, self.dropout, drop_input)
        cos, sin = jnp.asarray(rotations(self.grid, self.head_width, self.rope_base))

        def layer(x, scanned):
            parameters, number = scanned
            parameters = self._whole(parameters)
            drop = self._layer_dropout(number, drop_layers)
            q, k, v = queries_keys_values(parameters, x, cos, sin, heads=self.heads, eps=self.eps, dtype=self.dtype)
            mixed = causal_attention(q, k, v).reshape(x.shape)
            x = x + drop(matmul(mixed, parameters["wo"]).astype(jnp.float32), 0)
            added = feed_forward(parameters, x, eps=self.eps, dtype=self.dtype)
            return self._batch(x + drop(added.astype(jnp.float32), 1)), None

        layer = jax.checkpoint(layer, prevent_cse=False, policy=None if self.remat else _costly)
        x, _ = jax.lax.scan(layer, x, (self.blocks(), jnp.arange(self.layers)), unroll=self.unroll)
        return rms_norm(x, self.norm, self.eps)

    def logits(self, labels: Int[Array, "b"], codes: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        """The logits of every code at every position, float32, without dropout. For small vocabularies and tests."""
        hidden = self(labels, codes).astype(self.dtype)
        precision = matmul_precision(self.dtype)
        return jnp.einsum(
            "btd,vd->btv",
            hidden,
            self.output.astype(self.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def _class_vectors(self, labels: Int[Array, "b"]) -> Float[Array, "b 1 d"]:
        return self._whole(self.cls_embedding, jnp.float32)[labels][:, None]

    def _code_vectors(self, codes: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        if self.mesh is None:
            return self.tok_embedding[codes]
        vectors = sharded_lookup(codes.reshape(-1), self.tok_embedding, self.mesh)
        return vectors.reshape(*codes.shape, self.width)

    def _layer_dropout(self, number: Any, key: Any) -> Callable[[Array, int], Array]:
        """What becomes of the two branches (0 and 1) of a layer before they are added to the residual stream."""
        if key is None:
            return lambda branch, _: branch
        keys = jax.random.split(jax.random.fold_in(key, number))
        if self.path_dropout > 0:
            rate = self.path_dropout * number / max(self.layers - 1, 1)
            return lambda branch, which: dropped(branch, rate, keys[which], (branch.shape[0], 1, 1))
        return lambda branch, which: dropped(branch, self.dropout, keys[which])

    def _whole(self, parameters: Any, dtype: DTypeLike | None = None) -> Any:
        """Divided parameters, gathered on every device for one use; in the dtype of the products to send less.

        The gradient goes back the same way: every device rounds what its images say about a matrix to that dtype, and
        XLA sums the rounded parts over devices in it. In bfloat16 every part, and every sum on the way, is off by at
        most 2^-8 of itself. Micro-batches are added up in float32.
        """
        dtype = self.dtype if dtype is None else dtype
        if self.mesh is None:
            return parameters
        layout = NamedSharding(self.mesh, P())

        def gather(value: Array) -> Array:
            # The weights of norms are small, and stay float32.
            value = value.astype(dtype) if value.ndim > 1 else value
            return jax.lax.with_sharding_constraint(value, layout)

        return jax.tree.map(gather, parameters)

    def _batch(self, x: Array) -> Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, BATCH))


# Every matrix is divided along both axes of the mesh; embedding and head have their rows, one per code, on `codebook`.
# The few rows of the classes need not be, and a width of 3,200 could not be cut for 256 devices.
RULES: Rules = (
    (r"/cls_embedding$", P(None, "data")),
    (r"/(tok_embedding|output)$", P("codebook", "data")),
    (r"/layers/(wqkv|wo|w1|w2|w3)$", P(None, "data", "codebook")),
    (r"/layers/(attention_norm|ffn_norm)$", P()),
    (r"/norm$", P()),
)


def _costly(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the forward pass keeps for the backward pass: products, and what has a name, which is where entries drop.

    What lies between products is computed again, which costs less than to write it to memory and read it; without it
    about a third less is kept. So are weights gathered again: kept, those of all layers would fill every device with
    the whole network.
    """
    return primitive.name in ("dot_general", "name")


def dropped(x: Array, rate: Any, key: Any, shape: tuple[int, ...] | None = None) -> Array:
    """x with a share `rate` of its entries 0 and the others scaled up; `shape` makes entries share one fate."""
    if isinstance(rate, float) and rate == 0:
        return x
    # Random numbers are costly, so the backward pass does not draw them again.
    kept = checkpoint_name(jax.random.bernoulli(key, 1 - rate, x.shape if shape is None else shape), "kept")
    return jnp.where(kept, x / (1 - rate), 0)
