"""The region loss of StableVQ (arXiv 2609.26774): codes that are chosen pull codes that are not to their latents.

In a batch, code k is chosen by n_k latents, whose mean is its target t_k. A code that was not chosen for a number of
steps is unseen. Each code with n_k > 1 is a source: it gives its target to the unseen codes that are nearest to
it, as many as its share of them, ceil(n_k |unseen| / sum of n over the sources). An unseen code with several targets
gets their mean, one without any is left alone.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from fvq_jax.ops.sharded_codebook import ROWS

BLOCK_SIZE = 64  # sources that are compared with the unseen codes at once
_INFINITY_BITS = 0x7F800000


def region_loss(table: Float[Array, "k d"], targets: Float[Array, "k d"], has_target: Bool[Array, "k"]) -> Array:
    """The mean over codes with a target of |code - target|^2, summed over the d channels; its gradient goes to codes.

    It is 0 if there are none. (`codebook_loss` is a mean over tokens and channels.)
    """
    distance = jnp.sum(jnp.square(table - jax.lax.stop_gradient(targets)), axis=1)
    return jnp.sum(jnp.where(has_target, distance, 0)) / jnp.maximum(jnp.sum(has_target), 1)


def region_targets(
    table: Float[Array, "k d"],
    counts: Float[Array, "k"],
    sums: Float[Array, "k d"],
    unseen: Bool[Array, "k"],
    tokens: int,
    mesh: Mesh | None = None,
    block_size: int = BLOCK_SIZE,
) -> tuple[Float[Array, "k d"], Bool[Array, "k"]]:
    """The target of every code, and which codes have one; no gradient.

    Distances are float32 at HIGHEST precision. Of unseen codes that are equally far from a source, all get its target
    or none. Temporaries are [block_size, k] and the sources, at most min(tokens / 2, k) x d. On a mesh with axes `data`
    and `codebook` a device holds the part k / codebook of it; sources are gathered along `codebook` and divided
    over `data`.

    Args:
      table: the vectors that were searched.
      counts, sums: of the batch, see `code_tokens.code_sums`.
      unseen: codes that were chosen neither in this batch nor in the steps before it.
      tokens: in the batch; it bounds the number of sources.
    """
    table, counts, sums = jax.lax.stop_gradient((table, counts, sums))

    def find(table, counts, sums, unseen):
        means = sums / jnp.maximum(counts, 1)[:, None]
        axes = _Axes(mesh)
        missing = axes.sum_codebook(jnp.sum(unseen))
        given, givers = jax.lax.cond(
            missing > 0,
            lambda: _given(table, counts, means, unseen, missing, tokens, axes, block_size),
            lambda: (jnp.zeros_like(means), jnp.zeros_like(counts)),
        )
        given = given / jnp.maximum(givers, 1)[:, None]
        return jnp.where(counts[:, None] > 0, means, given), (counts > 0) | (givers > 0)

    if mesh is None:
        return find(table, counts, sums, unseen)
    run = jax.shard_map(find, mesh=mesh, in_specs=(ROWS,) * 4, out_specs=(ROWS, ROWS), check_vma=False)
    return run(table, counts, sums, unseen)


def _given(table, counts, means, unseen, missing, tokens, axes, block_size):
    """For every local code the sum of the targets that sources give to it, and how many do."""
    most = max(min(tokens // 2, len(table)), 1)
    chosen = counts > 1
    (index,) = jnp.nonzero(chosen, size=most, fill_value=len(table))

    def compact(values):
        return axes.gather_codebook(jnp.take(values, index, axis=0, mode="fill", fill_value=0))

    vectors, targets, hits = compact(table), compact(means), compact(jnp.where(chosen, counts, 0))
    # Of several devices each lists its own sources first: real ones come before the empty places of all.
    order = jnp.argsort(hits == 0, stable=True)
    vectors, targets, hits = vectors[order], targets[order], hits[order]
    quota = jnp.ceil(hits * missing.astype(jnp.float32) / jnp.maximum(jnp.sum(hits), 1))
    sources = jnp.sum(hits > 0)

    step = block_size * axes.data_size
    padding = -len(hits) % step
    vectors, targets = (jnp.pad(array, ((0, padding), (0, 0))) for array in (vectors, targets))
    quota = jnp.pad(quota, (0, padding))
    size = jnp.sum(jnp.square(table), axis=1)

    def give(carry):
        start, given, givers = carry
        begin = start + axes.data_index() * block_size
        cut = [jax.lax.dynamic_slice_in_dim(array, begin, block_size) for array in (vectors, targets, quota)]
        source, target, wanted = cut
        distance = jnp.sum(jnp.square(source), axis=1)[:, None] - 2 * _product(source, table.T) + size[None]
        distance = jnp.where(unseen[None], jnp.maximum(distance, 0), jnp.inf)
        gets = (distance <= _quantile(distance, wanted, axes)[:, None]) & unseen[None] & (wanted > 0)[:, None]
        gets = gets.astype(jnp.float32)
        return start + step, given + _product(gets.T, target), givers + jnp.sum(gets, axis=0)

    start = (jnp.int32(0), jnp.zeros_like(means), jnp.zeros_like(counts))
    _, given, givers = jax.lax.while_loop(lambda carry: carry[0] < sources, give, start)
    return axes.sum_data(given), axes.sum_data(givers)


def _quantile(distance, wanted, axes):
    """For every row the smallest value that is at least as large as `wanted` of its entries.

    Floats from 0 upwards are ordered like the integers with the same bits, so bisection finds it in 31 counts.
    """
    bits = jax.lax.bitcast_convert_type(distance, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # too few entries are <= low, enough are <= high
        middle = low + (high - low) // 2
        enough = axes.sum_codebook(jnp.sum(bits <= middle[:, None], axis=1)) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.full(len(distance), -1, jnp.int32)
    high = jnp.full(len(distance), _INFINITY_BITS, jnp.int32)
    _, high = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(high, jnp.float32)


class _Axes:
    """The collectives of a mesh; without one they do nothing."""

    def __init__(self, mesh):
        self._mesh = mesh
        self.data_size = 1 if mesh is None else mesh.shape["data"]

    def data_index(self):
        return 0 if self._mesh is None else jax.lax.axis_index("data")

    def sum_codebook(self, x):
        return x if self._mesh is None else jax.lax.psum(x, "codebook")

    def sum_data(self, x):
        return x if self._mesh is None else jax.lax.psum(x, "data")

    def gather_codebook(self, x):
        return x if self._mesh is None else jax.lax.all_gather(x, "codebook", tiled=True)


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
