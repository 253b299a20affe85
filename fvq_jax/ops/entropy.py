"""The entropy term of the loss, streamed over codes like the search, on one device or on a mesh.

The probabilities of all codes for all tokens are needed three times: for their sums, for the expected frequency of each
code, and for the gradient. They are computed anew each time, for one block of codes after another.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from fvq_jax.ops.sharded_codebook import ROWS, TOKENS

BLOCK_SIZE = 512  # codes per block
PRODUCTS = 6  # of all latents with all codes: two for the value, two of them anew and two others for the gradient
GROUPS = PartitionSpec("data")  # of values per token, after the tokens were gathered along `codebook`
EPSILON = 1e-5  # inside the logarithm of the mean, as in the published code


def entropy_loss(
    z: Float[Array, "n d"],
    codebook: Float[Array, "k d"],
    *,
    temperature: float,
    inner_product: bool = False,
    mesh: Mesh | None = None,
    block_size: int | None = None,
) -> Float[Array, ""]:
    """Entropy of each token's soft assignment (mean over tokens) minus the entropy of the mean assignment.

    Assignments are softmax(-|z - e|^2 / temperature), or softmax(z.e / temperature) if `inner_product`. A lower loss
    means that each token is surer while the batch uses more codes. Gradients reach latents and codes, in closed form.
    float32 at HIGHEST precision. The largest temporary is [n, block_size] (default 512); on a mesh with axes `data` and
    `codebook` it is [n / data, block_size], and every device visits its own rows of the codebook. Source: arXiv
    2310.05737, Eq. 4, with squared distances; arXiv 2412.02692 with products.
    """
    block_size = BLOCK_SIZE if block_size is None else block_size
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    return _entropy(z, codebook, inner_product, temperature, mesh, block_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _entropy(z, codebook, inner_product, temperature, mesh, block_size):
    return _forward(z, codebook, inner_product, temperature, mesh, block_size)[0]


def _forward(z, codebook, inner_product, temperature, mesh, block_size):
    def forward(z, rows):
        z = _gather(z, mesh)
        blocks = _Blocks(z, rows, inner_product, temperature, block_size, mesh)

        def add(carry, block):
            top, total, weighted = carry  # maximum of the logits so far, sums of exp(logit - top) and of that x logit
            logits = blocks.logits(block)
            new = jnp.maximum(top, logits.max(axis=1))
            weight, shrink = jnp.exp(logits - new[:, None]), jnp.exp(top - new)
            return (
                new,
                total * shrink + weight.sum(axis=1),
                weighted * shrink + jnp.sum(weight * logits, axis=1),
            ), None

        zero = jnp.zeros(len(z))
        (top, total, weighted), _ = jax.lax.scan(add, (jnp.full(len(z), -jnp.inf), zero, zero), blocks.all)
        highest = _over("codebook", jax.lax.pmax, top, mesh)
        shrink = jnp.exp(top - highest)
        total, weighted = (_over("codebook", jax.lax.psum, x * shrink, mesh) for x in (total, weighted))
        log_sum = highest + jnp.log(total)
        sure = weighted / total - log_sum  # sum over codes of p log p

        expected = jax.lax.map(lambda block: blocks.probability(block, log_sum)[0].mean(axis=0), blocks.all)
        expected = _over("data", jax.lax.pmean, expected.reshape(-1)[: len(rows)], mesh)
        used = _over("codebook", jax.lax.psum, jnp.sum(expected * jnp.log(expected + EPSILON)), mesh)
        loss = used - _over("data", jax.lax.pmean, sure.mean(), mesh)
        return loss, log_sum, sure, expected

    run = _on(mesh, forward, (TOKENS, ROWS), (PartitionSpec(), GROUPS, GROUPS, ROWS))
    loss, *sums = run(z, codebook)
    return loss, (z, codebook, *sums)


def _backward(inner_product, temperature, mesh, block_size, residuals, cotangent):
    def backward(z, rows, log_sum, sure, expected, cotangent):
        z = _gather(z, mesh)
        blocks = _Blocks(z, rows, inner_product, temperature, block_size, mesh)
        slope = jnp.log(expected + EPSILON) + expected / (expected + EPSILON)
        slope = jnp.pad(slope, (0, blocks.padding)).reshape(-1, blocks.size)
        tokens = len(z) * (1 if mesh is None else mesh.shape["data"])

        def add_slope(total, block):
            block, slope = block
            return total + blocks.probability(block, log_sum)[0] @ slope, None

        mean_slope, _ = jax.lax.scan(add_slope, jnp.zeros(len(z)), (blocks.all, slope))
        level = _over("codebook", jax.lax.psum, mean_slope, mesh) - sure

        def add_gradient(to_z, block):
            block, slope = block
            p, log_p = blocks.probability(block, log_sum)
            to_product = (
                p * (slope[None] - log_p - level[:, None]) * (blocks.factor * cotangent / (tokens * temperature))
            )
            codes = block[0]
            to_codes = _product(to_product.T, blocks.z)
            if not inner_product:
                to_codes -= to_product.sum(axis=0)[:, None] * codes
            # A token's gradients with respect to all its logits sum to 0, so what only depends on z adds nothing.
            return to_z + _product(to_product, codes), to_codes

        to_z, to_rows = jax.lax.scan(add_gradient, jnp.zeros_like(z), (blocks.all, slope))
        to_rows = _over("data", jax.lax.psum, to_rows.reshape(-1, z.shape[1])[: len(rows)], mesh)
        if mesh is not None:
            to_z = jax.lax.psum_scatter(to_z, "codebook", scatter_dimension=0, tiled=True)
        return to_z, to_rows

    specs = (TOKENS, ROWS, GROUPS, GROUPS, ROWS, PartitionSpec())
    return _on(mesh, backward, specs, (TOKENS, ROWS))(*residuals, cotangent)


_entropy.defvjp(_forward, _backward)


class _Blocks:
    """The local codes in blocks.

    Codes are shifted so that their mean is 0, to lose fewer digits. So are the tokens if distances count; the products
    of a token with all codes change by the same number, which does not matter.
    """

    def __init__(self, z, rows, inner_product, temperature, block_size, mesh):
        center = _over("codebook", jax.lax.pmean, rows.mean(axis=0), mesh)[None]
        self.z, rows = z if inner_product else z - center, rows - center
        self.temperature = temperature
        self.factor = 1 if inner_product else 2
        self.own, squared_norm = (
            jnp.zeros(len(x)) if inner_product else jnp.sum(x * x, axis=1) for x in (self.z, rows)
        )
        self.size = min(block_size, len(rows))
        self.padding = math.ceil(len(rows) / self.size) * self.size - len(rows)
        # Padding codes are very far away, but not infinitely: probability times logit must be 0, not NaN.
        squared_norm = jnp.pad(squared_norm, (0, self.padding), constant_values=1e30 * temperature)
        rows = jnp.pad(rows, ((0, self.padding), (0, 0)))
        self.all = rows.reshape(-1, self.size, rows.shape[1]), squared_norm.reshape(-1, self.size)

    def logits(self, block):
        codes, squared_norm = block
        distance = self.own[:, None] + squared_norm[None] - self.factor * _product(self.z, codes.T)
        return -distance / self.temperature

    def probability(self, block, log_sum):
        log_p = self.logits(block) - log_sum[:, None]
        return jnp.exp(log_p), log_p


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _gather(z, mesh):
    return z if mesh is None else jax.lax.all_gather(z, "codebook", tiled=True)


def _over(axis, reduce, x, mesh):
    return x if mesh is None else reduce(x, axis)


def _on(mesh, function, in_specs, out_specs):
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
