"""Products of activations and a kernel, with a gradient of the kernel that a CPU computes fast."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def matmul_precision(dtype: DTypeLike) -> str | None:
    """The precision at which float32 is really float32: without it a TPU multiplies in bfloat16 and a GPU in TF32."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def matmul(x: Float[Array, "*b c"], kernel: Float[Array, "c f"]) -> Float[Array, "*b f"]:
    """x @ kernel in the dtype of x, at `matmul_precision`. There are derivatives in reverse mode only."""
    # As matrices: from more dimensions XLA transposes activations for the gradient of the kernel by a loop over single
    # numbers, which took a CPU over a third of the backward pass.
    product = _of_rows(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype))
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def _product(a, b):
    return jnp.matmul(a, b, precision=matmul_precision(a.dtype))


_of_rows = jax.custom_vjp(_product)


def _forward(rows, kernel):
    return _product(rows, kernel), (rows, kernel)


def _backward(kept, gradient):
    rows, kernel = kept
    # On a CPU the barrier makes XLA write the transposed matrix to memory, which takes little time, and multiply it by
    # YNNPACK. Without it XLA takes Eigen, which reads rows as they are, and the step is slower (docs/results.md, "The
    # generator beside a peer").
    columns = jax.lax.platform_dependent(rows.T, cpu=jax.lax.optimization_barrier, default=lambda columns: columns)
    return _product(gradient, kernel.T), _product(columns, gradient)


_of_rows.defvjp(_forward, _backward)
