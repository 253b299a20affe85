"""The search as a GPU kernel (Pallas, Triton): scores never leave the registers, except the smallest ones.

Called by `ops/nearest.py`, which says what a score is and turns candidates into codes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from fvq_jax.ops.split_matmul import join
from fvq_jax.ops.vectors import l2_normalize


class Tile(NamedTuple):
    """What one program works on at a time, its warps, and how many programs are wanted at least.

    More programs than a GPU has multiprocessors fill it more evenly, but each leaves candidates in memory.
    """

    tokens: int
    codes: int
    warps: int
    programs: int


CHUNK = 64  # dimensions multiplied at a time, at most
LEAST_CHUNK = 16  # of a matrix unit
# The fastest of those tried on an H100 (docs/results.md). A program that keeps a set for every column has few columns,
# since the sets stay in registers.
ONE_SET = Tile(tokens=128, codes=256, warps=8, programs=2048)
ONE_SET_ONE_CHUNK = Tile(tokens=128, codes=128, warps=4, programs=2048)
MANY_SETS = Tile(tokens=128, codes=128, warps=8, programs=256)


def candidates(
    query: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    bias: Float[Array, "k"],
    *,
    normalize: bool,
    precision: str,
    classes: int,
    interpret: bool = False,
) -> tuple[Float[Array, "n c"], Int[Array, "n c"]]:
    """Finds, for every token, the smallest score in each of c sets of codes, and the code that has it.

    The codebook is cut into equal parts, so that even few tokens occupy the whole GPU. Each program visits one part
    for one block of tokens. If `classes` is 1 a part is one set, else code i belongs to set i % 128 of its part. Among
    equal scores the lowest index is kept.

    Query and codes are first written to memory as the bfloat16 parts that are multiplied: 2, 6 or 12 bytes for each of
    the k x d numbers at precision bf16, bf16_3x, highest. A kernel that made them itself was 2 to 3 times slower.
    """
    n, k = query.shape[0], codebook.shape[0]
    codes = codebook.astype(jnp.float32)
    codes = (l2_normalize(codes) if normalize else codes) - center[None]
    left, right = join(query, precision, "left"), join(codes, precision, "right")
    tile = MANY_SETS if classes > 1 else ONE_SET if left.shape[1] > CHUNK else ONE_SET_ONE_CHUNK
    token_blocks, code_blocks = pl.cdiv(n, tile.tokens), pl.cdiv(k, tile.codes)
    parts_wanted = min(pl.cdiv(tile.programs, token_blocks), code_blocks)
    blocks = pl.cdiv(code_blocks, parts_wanted)  # blocks of codes that one program visits
    parts = pl.cdiv(code_blocks, blocks)

    chunk = min(CHUNK, max(LEAST_CHUNK, pl.next_power_of_2(left.shape[1])))
    chunks, rows = pl.cdiv(left.shape[1], chunk), parts * blocks * tile.codes
    left = _padded(left, token_blocks * tile.tokens, chunks * chunk)
    right = _padded(right, rows, chunks * chunk)
    bias = jnp.pad(bias, (0, rows - k), constant_values=jnp.inf)

    sets = 1 if classes == 1 else tile.codes
    whole = pl.BlockSpec(memory_space=pl.ANY)
    # Under shard_map a kernel must say over which axes its results vary: those of the query.
    varying = jax.typeof(query).manual_axis_type
    out = functools.partial(jax.ShapeDtypeStruct, (len(left), parts * sets), manual_axis_type=varying)
    low, index = pl.pallas_call(
        functools.partial(_kernel, tile=tile, blocks=blocks, chunk=chunk, sets=sets),
        grid=(token_blocks, parts),
        in_specs=[whole] * 3,
        out_specs=[whole] * 2,
        out_shape=[out(dtype=jnp.float32), out(dtype=jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=3),
        interpret=interpret,
        name="nearest_code",
    )(left, right, bias)
    return low[:n], index[:n]


def _padded(x, rows, columns):
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def _kernel(left_ref, right_ref, bias_ref, low_ref, index_ref, *, tile, blocks, chunk, sets):
    token_block, part = pl.program_id(0), pl.program_id(1)
    tokens = pl.ds(token_block * tile.tokens, tile.tokens)

    def visit(block, best):
        start = (part * blocks + block) * tile.codes
        codes = pl.ds(start, tile.codes)

        def add(i, score):
            at = pl.ds(i * chunk, chunk)
            left, right = plgpu.load(left_ref.at[tokens, at]), plgpu.load(right_ref.at[codes, at])
            contract = (((1,), (1,)), ((), ()))
            return score + jax.lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)

        zero = jnp.zeros((tile.tokens, tile.codes), jnp.float32)
        score = jax.lax.fori_loop(0, left_ref.shape[1] // chunk, add, zero) + plgpu.load(bias_ref.at[codes])[None]
        lowest, at = score, start
        if sets == 1:
            lowest, at = jnp.min(score, axis=1), start + jnp.argmin(score, axis=1).astype(jnp.int32)
        low, index = best
        closer = lowest < low
        return jnp.where(closer, lowest, low), jnp.where(closer, at, index)

    shape = (tile.tokens,) if sets == 1 else (tile.tokens, tile.codes)
    first = jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    low, index = jax.lax.fori_loop(0, blocks, visit, first)
    out = part if sets == 1 else pl.ds(part * sets, sets)
    column = 0 if sets == 1 else jnp.arange(sets, dtype=jnp.int32)[None]
    plgpu.store(low_ref.at[tokens, out], low)
    plgpu.store(index_ref.at[tokens, out], index + column)
