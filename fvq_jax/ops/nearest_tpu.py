"""The search as a TPU kernel (Pallas, Mosaic): scores never leave VMEM, except the smallest ones.

Called by `ops/nearest.py`, which says what a score is and turns candidates into codes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from fvq_jax.ops.split_matmul import multiply, split
from fvq_jax.ops.vectors import l2_normalize

LANES = 128  # of the vector unit; code i belongs to lane i % 128
TOKEN_BLOCK = 1024 * 256  # elements of a block of tokens: fits into 16 MiB with the codes, the scores and their parts


def candidates(
    query: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    bias: Float[Array, "k"],
    *,
    normalize: bool,
    precision: str,
    interpret: bool = False,
) -> tuple[Float[Array, "n 128"], Int[Array, "n 128"]]:
    """Finds, for every token and lane, the smallest score among the lane's codes, and the code that has it.

    The grid visits all blocks of codes for each block of tokens. A score is only compared with the smallest one of its
    lane so far, so the loop needs no reduction. Among equal scores the lowest index is kept.
    """
    n, d = query.shape
    k = codebook.shape[0]
    rows = min(1024, max(256, TOKEN_BLOCK // d), pl.cdiv(n, LANES) * LANES)
    columns = 512 if d <= 512 else 256
    blocks = pl.cdiv(k, columns)
    # Beyond the end of the codebook a block holds arbitrary values; an infinite bias keeps them from being chosen.
    bias = jnp.pad(bias, (0, blocks * columns - k), constant_values=jnp.inf)
    parts = split(query, precision)
    of_tokens = pl.BlockSpec((rows, d), lambda i, j: (i, 0))
    best = pl.BlockSpec((rows, LANES), lambda i, j: (i, 0))
    # Under shard_map a kernel must say over which axes its results vary: those of the query.
    varying = jax.typeof(query).manual_axis_type
    out = functools.partial(jax.ShapeDtypeStruct, (n, LANES), manual_axis_type=varying)
    low, index = pl.pallas_call(
        functools.partial(_kernel, normalize=normalize, precision=precision),
        grid=(pl.cdiv(n, rows), blocks),
        in_specs=[
            pl.BlockSpec((columns, d), lambda i, j: (j, 0)),
            pl.BlockSpec((1, d), lambda i, j: (0, 0)),
            pl.BlockSpec((1, columns), lambda i, j: (0, j)),
            *[of_tokens] * len(parts),
        ],
        out_specs=[best, best],
        out_shape=[out(dtype=jnp.float32), out(dtype=jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="nearest_code",
    )(codebook, center[None], bias[None], *parts)
    return low, index + jnp.arange(LANES, dtype=jnp.int32)[None]


def _kernel(codes_ref, center_ref, bias_ref, *refs, normalize, precision):
    *parts_refs, low_ref, index_ref = refs
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
        low_ref[...] = jnp.full(low_ref.shape, jnp.inf, jnp.float32)
        index_ref[...] = jnp.zeros(index_ref.shape, jnp.int32)

    codes = codes_ref[...].astype(jnp.float32)
    codes = (l2_normalize(codes) if normalize else codes) - center_ref[...]
    score = bias_ref[...] + multiply(tuple(ref[...] for ref in parts_refs), split(codes, precision))
    low, index = low_ref[...], index_ref[...]
    for start in range(0, score.shape[1], LANES):
        part = score[:, start : start + LANES]
        closer = part < low
        low = jnp.where(closer, part, low)
        index = jnp.where(closer, block * score.shape[1] + start, index)
    low_ref[...], index_ref[...] = low, index
