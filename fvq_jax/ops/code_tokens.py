"""Statistics of the tokens that chose each code, on one device or with the codebook's rows spread over a mesh.

On a mesh, tokens are divided over all devices and rows over the axis `codebook`. Every device gathers the tokens along
`codebook`, counts those of its own rows, and one sum over `data` follows. No array of tokens x codes exists. Nothing
here has a gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.ops.sharded_codebook import ROWS, TOKENS, padded_tokens


def code_sums(
    z: Float[Array, "n d"], codes: Int[Array, "n"], codebook_size: int, mesh: Mesh | None = None
) -> tuple[Float[Array, "k"], Float[Array, "k d"]]:
    """For every code, how many tokens chose it, and their sum; float32, divided like the rows of the codebook.

    A scatter-add. On a mesh with axes `data` and `codebook` n may be any number, and k must be a multiple of the size
    of `codebook`.
    """

    def add_up(z, local, rows):
        sums = jnp.zeros((rows, z.shape[1]), jnp.float32).at[local].add(z, mode="drop")
        counts = jnp.zeros(rows, jnp.float32).at[local].add(1.0, mode="drop")
        return counts, sums

    return _per_row(add_up, jax.lax.psum, z, codes, codebook_size, mesh, (ROWS, ROWS))


def smallest_of_code(
    values: Float[Array, "n"], codes: Int[Array, "n"], codebook_size: int, mesh: Mesh | None = None
) -> Float[Array, "n"]:
    """For every token the smallest of the values of all tokens, on all devices, that chose the same code."""

    def smallest(values, local, rows):
        return jnp.full(rows, jnp.inf, jnp.float32).at[local].min(values, mode="drop")

    of_code = _per_row(smallest, jax.lax.pmin, values, codes, codebook_size, mesh, ROWS)
    if mesh is None:
        return of_code[codes]

    def look_up(codes, of_code):
        codes = jax.lax.all_gather(codes, "codebook", tiled=True)
        local, mine = _local(codes, len(of_code))
        found = jnp.where(mine, of_code[jnp.where(mine, local, 0)], 0)
        return jax.lax.psum_scatter(found, "codebook", tiled=True)

    padded = padded_tokens(codes, mesh)
    return jax.shard_map(look_up, mesh=mesh, in_specs=(TOKENS, ROWS), out_specs=TOKENS)(padded, of_code)[: len(codes)]


def random_tokens(
    z: Float[Array, "n d"],
    key: Shaped[Array, ""],
    count: int,
    mesh: Mesh | None = None,
    start: Int[Array, ""] | int = 0,
) -> Float[Array, "{count} d"]:
    """Random tokens, one for every code, the same on every mesh.

    Any n codes that follow each other from code `start` on, past the last one to the first, get different ones. The
    result is divided like the rows of the codebook. Every device holds all n tokens for a moment.
    """
    z = jax.lax.stop_gradient(z)
    order = jax.random.permutation(key, len(z))
    index = order[(jnp.arange(count) - start) % count % len(z)]
    if mesh is None:
        return z[index]

    def take(z, index):
        return jax.lax.all_gather(z, ("data", "codebook"), tiled=True)[index]

    run = jax.shard_map(take, mesh=mesh, in_specs=(TOKENS, ROWS), out_specs=ROWS, check_vma=False)
    return run(padded_tokens(z, mesh), index)


def _per_row(function, reduce, values, codes, codebook_size, mesh, out_specs):
    """`function(values, local codes, local rows)`, which gives an array of rows, reduced over the mesh."""
    values, codes = jax.lax.stop_gradient((values, codes))
    if mesh is None:
        return function(values, codes, codebook_size)
    rows = codebook_size // mesh.shape["codebook"]

    def run(values, codes):
        gather = functools.partial(jax.lax.all_gather, axis_name="codebook", tiled=True)
        values, codes = gather(values), gather(codes)
        local, mine = _local(codes, rows)
        return reduce(function(values, jnp.where(mine, local, rows), rows), "data")

    padded = padded_tokens(values, mesh), padded_tokens(codes, mesh, -1)
    return jax.shard_map(run, mesh=mesh, in_specs=(TOKENS, TOKENS), out_specs=out_specs)(*padded)


def _local(codes, rows):
    """The codes counted from this device's first row, and whether they are among its rows."""
    local = codes - jax.lax.axis_index("codebook") * rows
    return local, (local >= 0) & (local < rows)
