"""The search as a GPU kernel (Pallas, Triton): scores never leave the registers, except the smallest ones.

Called by `ops/nearest.py`, which says what a score is and turns candidates into codes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from fvq_jax.ops.split_matmul import multiply, split

TOKENS, CODES, CHUNK = 128, 128, 64  # tile of one program, and dimensions multiplied at a time
PROGRAMS = 256  # how many are wanted at least, so that every multiprocessor of a large GPU has some


def candidates(
    query: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    center: Float[Array, "d"],
    bias: Float[Array, "k"],
    *,
    normalize: bool,
    precision: str,
    interpret: bool = False,
) -> tuple[Float[Array, "n c"], Int[Array, "n c"]]:
    """Finds, for every token, the smallest score in each of c sets of codes, and the code that has it.

    The codebook is cut into equal parts, so that even few tokens occupy the whole GPU; in each part, code i belongs to
    set i % 128. Each program visits one part for one block of tokens. Among equal scores the lowest index is kept.
    """
    n, k = query.shape[0], codebook.shape[0]
    token_blocks, code_blocks = pl.cdiv(n, TOKENS), pl.cdiv(k, CODES)
    parts_wanted = min(pl.cdiv(PROGRAMS, token_blocks), code_blocks)
    blocks = pl.cdiv(code_blocks, parts_wanted)  # blocks of codes that one program visits
    parts = pl.cdiv(code_blocks, blocks)
    # The norms of the codes are computed here, since a program sees only some dimensions at a time.
    scale = jnp.ones(k, jnp.float32)
    if normalize:
        rows = codebook.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(rows * rows, axis=1), 1e-24))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    # Under shard_map a kernel must say over which axes its results vary: those of the query.
    varying = jax.typeof(query).manual_axis_type
    out = functools.partial(jax.ShapeDtypeStruct, (n, parts * CODES), manual_axis_type=varying)
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, precision=precision),
        grid=(token_blocks, parts),
        in_specs=[whole] * 5,
        out_specs=[whole] * 2,
        out_shape=[out(dtype=jnp.float32), out(dtype=jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="nearest_code",
    )(query, codebook, center, bias, scale)


def _kernel(query_ref, codebook_ref, center_ref, bias_ref, scale_ref, low_ref, index_ref, *, blocks, precision):
    (n, d), k = query_ref.shape, codebook_ref.shape[0]
    token_block, part = pl.program_id(0), pl.program_id(1)
    tokens = pl.ds(token_block * TOKENS, TOKENS)
    is_token = token_block * TOKENS + jnp.arange(TOKENS) < n
    dims = pl.cdiv(d, CHUNK)

    def visit(block, best):
        start = (part * blocks + block) * CODES
        codes = pl.ds(start, CODES)
        is_code = start + jnp.arange(CODES) < k
        scale = plgpu.load(scale_ref.at[codes], mask=is_code, other=0.0)

        def add(chunk, score):
            at = pl.ds(chunk * CHUNK, CHUNK)
            is_dim = chunk * CHUNK + jnp.arange(CHUNK) < d
            center = plgpu.load(center_ref.at[at], mask=is_dim, other=0.0)
            e = plgpu.load(codebook_ref.at[codes, at], mask=is_code[:, None] & is_dim[None], other=0.0)
            q = plgpu.load(query_ref.at[tokens, at], mask=is_token[:, None] & is_dim[None], other=0.0)
            e = e.astype(jnp.float32) * scale[:, None] - center[None]
            return score + multiply(split(q, precision), split(e, precision))

        bias = plgpu.load(bias_ref.at[codes], mask=is_code, other=jnp.inf)
        score = jax.lax.fori_loop(0, dims, add, jnp.zeros((TOKENS, CODES), jnp.float32)) + bias[None]
        low, index = best
        closer = score < low
        return jnp.where(closer, score, low), jnp.where(closer, start, index)

    shape = (TOKENS, CODES)
    low, index = jax.lax.fori_loop(
        0, blocks, visit, (jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))
    )
    out = pl.ds(part * CODES, CODES)
    plgpu.store(low_ref.at[tokens, out], low, mask=is_token[:, None])
    plgpu.store(index_ref.at[tokens, out], index + jnp.arange(CODES)[None], mask=is_token[:, None])
