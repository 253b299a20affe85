"""Search and look-up when the codebook's rows are spread over a mesh axis.

Tokens are sharded over both mesh axes, codebook rows over `codebook` (and copied along `data`). Devices send each other
latents, codes and chosen vectors, which are small, but never the codebook. With an axis of size 1 the collectives
vanish, so the training step always takes this path, on one device and on a pod.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.ops.nearest import mean_code, search

TOKENS = PartitionSpec(("data", "codebook"))
ROWS = PartitionSpec("codebook")


def sharded_nearest_code(
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    mesh: Mesh,
    *,
    block_size: int | None = None,
    l2_normalize: bool = False,
    inner_product: bool = False,
    precision: str = "highest",
    implementation: str = "auto",
) -> Int[Array, "n"]:
    """`ops.nearest.nearest_code` on a mesh with axes `data` and `codebook`; same codes, same ties, no gradient.

    Each device gathers the latents along `codebook` and searches its own rows; then the best (score, index) of every
    shard is sent back to the device that holds the token. n must be a multiple of the number of devices, k of the size
    of the `codebook` axis.
    """

    def nearest(z, rows):
        z = jax.lax.all_gather(z, "codebook", tiled=True)
        center = jax.lax.pmean(mean_code(rows, l2_normalize), "codebook")
        score, index = search(
            z,
            rows,
            center,
            block_size=block_size,
            l2_normalize=l2_normalize,
            inner_product=inner_product,
            precision=precision,
            implementation=implementation,
        )
        index = index + jax.lax.axis_index("codebook") * rows.shape[0]
        exchange = functools.partial(jax.lax.all_to_all, axis_name="codebook", split_axis=0, concat_axis=0, tiled=False)
        shards = mesh.shape["codebook"]
        score, index = exchange(score.reshape(shards, -1)), exchange(index.reshape(shards, -1))
        # argmin returns the first shard of equal scores, and that one holds the lowest rows.
        winner = jnp.argmin(score, axis=0)
        return jnp.take_along_axis(index, winner[None], axis=0)[0]

    z, codebook = jax.lax.stop_gradient((z, codebook))
    return jax.shard_map(nearest, mesh=mesh, in_specs=(TOKENS, ROWS), out_specs=TOKENS)(z, codebook)


def sharded_lookup(codes: Int[Array, "n"], codebook: Float[Array, "k d"], mesh: Mesh) -> Float[Array, "n d"]:
    """`codebook[codes]` on a mesh with axes `data` and `codebook`.

    The device that holds a row puts it into an array that is zero elsewhere, and a reduce-scatter sends it to the
    device that holds the token. The gradient is the exact reverse: a scatter-add into the local rows, summed over
    `data`.
    """

    def look_up(codes, rows):
        codes = jax.lax.all_gather(codes, "codebook", tiled=True)
        local = codes - jax.lax.axis_index("codebook") * rows.shape[0]
        mine = (local >= 0) & (local < rows.shape[0])
        vectors = jnp.where(mine[:, None], rows[jnp.where(mine, local, 0)], 0)
        return jax.lax.psum_scatter(vectors, "codebook", scatter_dimension=0, tiled=True)

    return jax.shard_map(look_up, mesh=mesh, in_specs=(TOKENS, ROWS), out_specs=TOKENS)(codes, codebook)


def padded_tokens(tokens: Shaped[Array, "n *d"], mesh: Mesh, value: int = 0) -> Shaped[Array, "m *d"]:
    """The tokens and, behind them, as many filled with `value` as make their number a multiple of the devices."""
    widths = ((0, -len(tokens) % mesh.size),) + ((0, 0),) * (tokens.ndim - 1)
    return jnp.pad(tokens, widths, constant_values=value)
