"""Matrix products at a stated precision, made of bfloat16 parts; for XLA programs and for kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Passes of a bfloat16 matrix unit that one product takes. A TPU builds a float32 product (`highest`) from six.
PASSES = {"highest": 6, "bf16_3x": 3, "bf16": 1}
_PARTS = {6: 3, 3: 2, 1: 1}


def split(x: Float[Array, "n d"], precision: str) -> tuple[Float[Array, "n d"], ...]:
    """Splits float32 `x` into the parts that are multiplied.

    highest: `x` itself; bf16: `x` rounded to bfloat16; bf16_3x: that, and the remainder rounded to bfloat16. KeyError
    for an unknown precision.
    """
    if PASSES[precision] == 6:
        return (x,)
    return _bfloat16_parts(x, precision)


def multiply(a: tuple[Float[Array, "n d"], ...], b: tuple[Float[Array, "k d"], ...]) -> Float[Array, "n k"]:
    """a @ b.T in float32, from the parts that `split` returned for a and b.

    With two parts each, it sums three bfloat16 products in float32, about 16 bits of precision; the product of the two
    remainders is left out.
    """
    product = multiply_parts(a[0], b[0])
    if len(a) == 2:
        product += multiply_parts(a[0], b[1]) + multiply_parts(a[1], b[0])
    return product


def multiply_parts(a: Float[Array, "n d"], b: Float[Array, "k d"]) -> Float[Array, "n k"]:
    """a @ b.T, summed in float32; float32 operands at HIGHEST precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def join(x: Float[Array, "n d"], precision: str, side: str) -> Float[Array, "n c"]:
    """The parts of `x` side by side, bfloat16, so that a single product adds up the products of the parts.

    join(a, precision, "left") @ join(b, precision, "right").T is a @ b.T at this precision; c = PASSES[precision] d.
    Three parts (`highest`) hold the 24 bits of float32; products of parts that lie below these bits are left out.
    """
    parts = _bfloat16_parts(x, precision)
    pairs = [(i, j) for i in range(len(parts)) for j in range(len(parts) - i)]
    columns = [parts[{"left": i, "right": j}[side]] for i, j in pairs]
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)


def _bfloat16_parts(x, precision):
    """One to three bfloat16 arrays whose sum is nearly x."""
    count = _PARTS[PASSES[precision]]
    parts = []
    for _ in range(count - 1):
        # Rounded by hand: XLA may skip a cast to bfloat16 and back, which would leave no remainder.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        high = jax.lax.bitcast_convert_type((bits + 0x8000) & jnp.uint32(0xFFFF0000), jnp.float32)
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
    return (*parts, x.astype(jnp.bfloat16))
