"""Bridges: networks that map the trained codebook to the table that is searched (arXiv 2509.10140).

Through a bridge, the gradient of one selected code moves all codes, so no code is left behind. Kinds, by name:

  none        the table is the codebook itself (a plain VQ network)
  linear      one linear layer for every code
  mlp5        five linear layers for every code
  SIZE/P      VQBridge: compress groups of P*P codes to tokens, process them with a small ViT, recover the
              codes. SIZE is XS, S, B, L or XL; SIZE/P-dN sets the number of blocks (default 2).
  dit-SIZE/P  the same with DiT blocks (arXiv 2212.09748): the position embedding is fixed, and every layer norm is
              shifted, scaled and gated by one learned vector, which replaces DiT's class embedding.
  dit-SIZE/P-cN  with such a vector for each of N classes and one more for "no class": a table per class. The bridge
              makes one of them at a time; it can be used, and not be trained.

Arrays are [k, d] on both sides, parameters and results float32.
"""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.ops.attention import attention
from fvq_jax.ops.matmul import matmul_precision

HEAD_WIDTH = {"XS": 8, "S": 16, "B": 32, "L": 64, "XL": 128}
HEADS = 4
MLP_LAYERS = 5
XAVIER = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class BridgeSpec:
    """The parts of a bridge name; `width`, `patch` and `depth` are 0 for bridges without groups.

    `classes` is how many classes the table depends on; 0 if there is a single table.
    """

    kind: str  # none | linear | mlp5 | vit | dit
    width: int = 0
    patch: int = 0
    depth: int = 0
    classes: int = 0

    @property
    def group_size(self) -> int:
        """Codes that are compressed into one token; 1 where codes are mapped one by one."""
        return max(self.patch, 1) ** 2


def parse_bridge(name: str) -> BridgeSpec:
    """Reads a bridge name; ValueError with the possible names if it is none of them."""
    if name in ("none", "linear", "mlp5"):
        return BridgeSpec(name)
    match = re.fullmatch(r"(dit-)?(XS|S|B|L|XL)/([1-9]\d*)(?:-d([1-9]\d*))?(?:-c([1-9]\d*))?", name)
    if not match or (match[5] and not match[1]):
        raise ValueError(
            f"unknown bridge {name!r}: use none, linear, mlp5 or SIZE/P[-dN] with SIZE one of {', '.join(HEAD_WIDTH)}, "
            "for instance L/4 or B/8-d4; dit-SIZE/P[-dN] has DiT blocks, and with -cN a table for each of N classes"
        )
    dit, size, patch, depth, classes = match.groups()
    kind = "dit" if dit else "vit"
    return BridgeSpec(kind, HEADS * HEAD_WIDTH[size], int(patch), int(depth or 2), int(classes or 0))


def bridge_name(spec: BridgeSpec) -> str:
    """The name that `parse_bridge` reads as `spec`; ValueError if its width is none of the sizes."""
    if not spec.patch:
        return spec.kind
    sizes = {HEADS * width: size for size, width in HEAD_WIDTH.items()}
    if spec.width not in sizes:
        raise ValueError(f"no bridge is {spec.width} wide: the sizes are {', '.join(map(str, sizes))}")
    depth = "" if spec.depth == 2 else f"-d{spec.depth}"
    classes = f"-c{spec.classes}" if spec.classes else ""
    return f"{'dit-' if spec.kind == 'dit' else ''}{sizes[spec.width]}/{spec.patch}{depth}{classes}"


def rows_of_groups(codebook_size: int, group_size: int, groups: str) -> int:
    """How many equal blocks of whole groups the codebook consists of; the `codebook` axis must divide this number.

    With `2d` patches a block is a row of patches of the square raster, with `1d` groups it is a single group.
    ValueError if the groups do not fit the codebook.
    """
    if groups == "1d":
        if codebook_size % group_size:
            raise ValueError(f"{codebook_size} codes are not divisible by groups of {group_size}")
        return codebook_size // group_size
    side, patch = math.isqrt(codebook_size), math.isqrt(group_size)
    if side * side != codebook_size:
        raise ValueError(f"{codebook_size} codes are not a square, which 2d patches need")
    if side % patch:
        raise ValueError(
            f"the {side} x {side} raster of {codebook_size} codes is not divisible by {patch} x {patch} patches"
        )
    return side // patch


def group_codes(codebook: Float[Array, "k d"], group_size: int, groups: str) -> Float[Array, "g p"]:
    """One row per group: its codes, flattened. `2d`: patches of the row-major square raster; `1d`: runs of codes."""
    k, d = codebook.shape
    if groups == "1d":
        return codebook.reshape(k // group_size, group_size * d)
    side, patch = math.isqrt(k), math.isqrt(group_size)
    raster = codebook.reshape(side // patch, patch, side // patch, patch, d)
    return raster.transpose(0, 2, 1, 3, 4).reshape(k // group_size, group_size * d)


def ungroup_codes(grouped: Shaped[Array, "g p"], group_size: int, groups: str) -> Shaped[Array, "k d"]:
    """The inverse of `group_codes`."""
    k, d = grouped.shape[0] * group_size, grouped.shape[1] // group_size
    if groups == "1d":
        return grouped.reshape(k, d)
    side, patch = math.isqrt(k), math.isqrt(group_size)
    raster = grouped.reshape(side // patch, side // patch, patch, patch, d)
    return raster.transpose(0, 2, 1, 3, 4).reshape(k, d)


def group_positions(codebook_size: int, group_size: int, groups: str) -> Int[np.ndarray, "k"]:
    """The position of every code in its group, in [0, group_size): in which order `group_codes` flattens them."""
    positions = jnp.tile(jnp.arange(group_size), (codebook_size // group_size, 1))
    return np.asarray(ungroup_codes(positions, group_size, groups))[:, 0]


def position_embedding(groups: int, width: int, kind: str) -> Float[np.ndarray, "g c"]:
    """Sines and cosines of each group's position; their wavelengths grow geometrically from 2 pi to 10,000 x 2 pi.

    `1d`: the position is the index. `2d`: the first half of the channels encodes the column in the square raster of
    groups, the second half the row, in the order of DiT (arXiv 2212.09748).
    """
    index = np.arange(groups)
    if kind == "1d":
        return _waves(index, width).astype(np.float32)
    row, column = np.divmod(index, math.isqrt(groups))
    return np.concatenate([_waves(column, width // 2), _waves(row, width // 2)], axis=1).astype(np.float32)


def _waves(position: Int[np.ndarray, "g"], width: int) -> Float[np.ndarray, "g c"]:
    angle = position[:, None] / 10000.0 ** (np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _dense(features: int, dtype: DTypeLike, name: str, kernel_init: Initializer = XAVIER) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, precision=matmul_precision(dtype), kernel_init=kernel_init, name=name)


def _layer_norm(x: Float[Array, "g c"], dtype: DTypeLike, name: str) -> Float[Array, "g c"]:
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False, dtype=dtype, name=name)(
        x
    )


def _modulation(condition: Float[Array, "1 c"], parts: int, name: str) -> list[Float[Array, "1 c"]]:
    """Shifts, scales and gates, float32; all zero at the start (adaLN-zero)."""
    layer = _dense(parts * condition.shape[1], jnp.float32, name, nn.initializers.zeros)
    return jnp.split(layer(nn.silu(condition)), parts, axis=1)


def _modulate(x: Float[Array, "g c"], shift: Float[Array, "1 c"], scale: Float[Array, "1 c"]) -> Float[Array, "g c"]:
    return x * (1 + scale.astype(x.dtype)) + shift.astype(x.dtype)


class BridgeBlock(nn.Module):
    """Pre-LayerNorm transformer block over all tokens: 4 heads, MLP of twice the width, tanh GELU.

    With a `condition`, attention and MLP are each shifted and scaled after their layer norm, and gated before they are
    added. At the start all gates are 0, so the block is the identity. `divided` says whether the tokens may be divided
    over devices.
    """

    dtype: DTypeLike = jnp.float32
    divided: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "g c"], condition: Float[Array, "1 c"] | None = None) -> Float[Array, "g c"]:
        """Applies the block; softmax in float32."""
        if condition is None:
            x = x + self._attention(_layer_norm(x, self.dtype, "norm1"))
            return x + self._mlp(_layer_norm(x, self.dtype, "norm2"))
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(condition, 6, "modulation")
        h = self._attention(_modulate(_layer_norm(x, self.dtype, "norm1"), shift1, scale1))
        x = x + gate1.astype(self.dtype) * h
        h = self._mlp(_modulate(_layer_norm(x, self.dtype, "norm2"), shift2, scale2))
        return x + gate2.astype(self.dtype) * h

    def _attention(self, x):
        g, width = x.shape
        qkv = _dense(3 * width, self.dtype, "qkv")(x)
        q, k, v = qkv.reshape(1, g, 3, HEADS, width // HEADS).transpose(2, 0, 1, 3, 4)
        with jax.default_matmul_precision(matmul_precision(self.dtype)):
            h = attention(q, k, v, divided=self.divided, limit=math.inf)
        return _dense(width, self.dtype, "out")(h.reshape(g, width))

    def _mlp(self, x):
        h = _dense(2 * x.shape[1], self.dtype, "mlp_in")(x)
        return _dense(x.shape[1], self.dtype, "mlp_out")(nn.gelu(h, approximate=True))


class VQBridge(nn.Module):
    """Compresses, processes and recovers the codes. Its last layer starts at 0: all codes tie, and code 0 is chosen.

    Attributes:
      spec: kind (vit or dit), width, patch, depth and classes.
      groups: "2d" (published: patches of the sqrt(k) x sqrt(k) raster) or "1d" (runs of consecutive codes).
      dtype: compute dtype of the blocks. The recovered codes are float32 at full precision: rounded to bfloat16, some
        would be equal, and the search chooses only the first of equal codes.
      divided: whether the codes may be divided over devices.
    """

    spec: BridgeSpec
    groups: str = "2d"
    dtype: DTypeLike = jnp.float32
    divided: bool = False

    @nn.compact
    def __call__(
        self, codebook: Float[Array, "k d"], condition: Int[Array, ""] | int | None = None
    ) -> Float[Array, "k d"]:
        """The bridged codebook; `condition` is a class in [0, classes), and None or `classes` means no class."""
        grouped = group_codes(codebook, self.spec.group_size, self.groups)
        tokens = _dense(self.spec.width, self.dtype, "compress")(grouped)
        vector = None
        if self.spec.kind == "dit":
            tokens = tokens + self._positions(*tokens.shape).astype(self.dtype)
            vector = self._class_vector(condition)
        for i in range(self.spec.depth):
            tokens = BridgeBlock(self.dtype, self.divided, name=f"block{i}")(tokens, vector)
        tokens = _layer_norm(tokens, jnp.float32, "norm_out")
        if vector is not None:
            tokens = _modulate(tokens, *_modulation(vector, 2, "modulation_out"))
        recover = _dense(grouped.shape[-1], jnp.float32, "recover", nn.initializers.zeros)
        return ungroup_codes(recover(tokens), self.spec.group_size, self.groups)

    def _class_vector(self, condition):
        """The row [1, c] of a class; the last one is for no class, and the only one without classes."""
        classes = self.spec.classes
        rows = self.param("class_embedding", nn.initializers.normal(0.02), (classes + 1, self.spec.width))
        return jax.lax.dynamic_slice_in_dim(rows, classes if condition is None else condition, 1) if classes else rows

    def _positions(self, g, width):
        """The position embedding: a parameter, so that a checkpoint's own one is used and kept, but never trained."""
        table = self.param("position_embedding", lambda _: jnp.asarray(position_embedding(g, width, self.groups)))
        return jax.lax.stop_gradient(table)


class CodewiseBridge(nn.Module):
    """Linear layers of width d applied to every code alone, GELU between them; one layer is the SimVQ-like baseline."""

    layers: int = 1

    @nn.compact
    def __call__(self, codebook: Float[Array, "k d"]) -> Float[Array, "k d"]:
        """The bridged codebook."""
        d = codebook.shape[-1]
        for i in range(self.layers):
            codebook = _dense(d, jnp.float32, f"linear{i}")(codebook if i == 0 else nn.gelu(codebook))
        return codebook


def make_bridge(name: str, groups: str, dtype: DTypeLike, divided: bool = False) -> nn.Module | None:
    """Makes the bridge called `name` (see the top of this file); None for `none`. ValueError for an unknown name.

    `divided` says whether the codes may be divided over devices.
    """
    spec = parse_bridge(name)
    if spec.kind == "none":
        return None
    if spec.patch:
        return VQBridge(spec, groups, dtype, divided)
    return CodewiseBridge(1 if spec.kind == "linear" else MLP_LAYERS)
