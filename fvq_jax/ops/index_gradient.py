"""Index backpropagation (arXiv 2412.02692): the choice of one code passes a gradient to all codes.

When gradients are computed, the hard choice is treated as the soft one, softmax(z.e). The probabilities of all codes
for all tokens are never held. They are computed for one block of codes after another: first for their sums, and once
more for the gradient, which has a closed form.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from fvq_jax.ops.sharded_codebook import ROWS, TOKENS

BLOCK_SIZE = 512  # codes per block
PRODUCTS = 6  # of all latents with all codes: two for the sums, four for the gradient
GROUPS = PartitionSpec("data")  # of values per token, after the tokens were gathered along `codebook`


def with_index_gradient(
    chosen: Float[Array, "n d"],
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    *,
    mesh: Mesh | None = None,
    block_size: int = BLOCK_SIZE,
) -> Float[Array, "n d"]:
    """The chosen codes, unchanged; their gradient also reaches latents and codes by way of the index.

    To `chosen` passes the whole gradient g. Of token t it passes to the logit of code j as p_j (g.e_j - g.m), where
    p = softmax(z.e) over all codes and m is the sum of p_j e_j; from the logit it passes on to z and to e_j, its two
    factors. float32 at HIGHEST precision.

    Temporaries are [n, block_size] and [n, d]. On a mesh with axes `data` and `codebook` they have n / data rows, and
    every device visits its own codes; n must be a multiple of the number of devices, and k of the size of `codebook`.
    """
    return _with_index_gradient(chosen, z.astype(jnp.float32), codebook.astype(jnp.float32), mesh, block_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _with_index_gradient(chosen, z, codebook, mesh, block_size):
    return chosen


def _forward(chosen, z, codebook, mesh, block_size):
    def forward(z, rows):
        z = _gather(z, mesh)
        blocks = _Blocks(rows, block_size, mesh)

        def add(carry, block):
            top, total, weighted = carry  # maximum of the logits so far, sums of exp(logit - top) and of that x code
            logits = blocks.logits(z, block)
            new = jnp.maximum(top, logits.max(axis=1))
            weight, shrink = jnp.exp(logits - new[:, None]), jnp.exp(top - new)
            weighted = weighted * shrink[:, None] + _product(weight, block[0])
            return (new, total * shrink + weight.sum(axis=1), weighted), None

        start = jnp.full(len(z), -jnp.inf), jnp.zeros(len(z)), jnp.zeros_like(z)
        (top, total, weighted), _ = jax.lax.scan(add, start, blocks.all)
        if mesh is None:
            return top + jnp.log(total), weighted / total[:, None]
        highest = jax.lax.pmax(top, "codebook")
        shrink = jnp.exp(top - highest)
        total = jax.lax.psum(total * shrink, "codebook")
        mean = weighted * (shrink / total)[:, None]
        return highest + jnp.log(total), _scatter(mean, mesh)

    log_sum, mean = _on(mesh, forward, (TOKENS, ROWS), (GROUPS, TOKENS))(z, codebook)
    return chosen, (z, codebook, log_sum, mean)


def _backward(mesh, block_size, residuals, cotangent):
    def backward(z, rows, log_sum, mean, cotangent):
        level = _gather(jnp.sum(cotangent * mean, axis=1), mesh)
        z, slope = _gather(z, mesh), _gather(cotangent, mesh)
        blocks = _Blocks(rows, block_size, mesh)

        def add_gradient(to_z, block):
            p = jnp.exp(blocks.logits(z, block) - log_sum[:, None])
            to_logit = p * (_product(slope, block[0].T) - level[:, None])
            return to_z + _product(to_logit, block[0]), _product(to_logit.T, z)

        to_z, to_rows = jax.lax.scan(add_gradient, jnp.zeros_like(z), blocks.all)
        to_rows = to_rows.reshape(-1, z.shape[1])[: len(rows)]
        return _scatter(to_z, mesh), to_rows if mesh is None else jax.lax.psum(to_rows, "data")

    run = _on(mesh, backward, (TOKENS, ROWS, GROUPS, TOKENS, TOKENS), (TOKENS, ROWS))
    return cotangent, *run(*residuals, cotangent)


_with_index_gradient.defvjp(_forward, _backward)


class _Blocks:
    """The local codes in blocks, with a bias that is -inf for padding.

    Codes are shifted so that their mean is 0, to lose fewer digits. All logits of a token change by the same number,
    and its gradients with respect to them sum to 0; so neither probabilities nor gradients change.
    """

    def __init__(self, rows, block_size, mesh):
        center = rows.mean(axis=0)
        rows = rows - (center if mesh is None else jax.lax.pmean(center, "codebook"))[None]
        size = min(block_size, len(rows))
        padding = math.ceil(len(rows) / size) * size - len(rows)
        bias = jnp.pad(jnp.zeros(len(rows)), (0, padding), constant_values=-jnp.inf)
        rows = jnp.pad(rows, ((0, padding), (0, 0)))
        self.all = rows.reshape(-1, size, rows.shape[1]), bias.reshape(-1, size)

    def logits(self, z, block):
        codes, bias = block
        return _product(z, codes.T) + bias[None]


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _gather(x, mesh):
    return x if mesh is None else jax.lax.all_gather(x, "codebook", tiled=True)


def _scatter(x, mesh):
    return x if mesh is None else jax.lax.psum_scatter(x, "codebook", scatter_dimension=0, tiled=True)


def _on(mesh, function, in_specs, out_specs):
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
