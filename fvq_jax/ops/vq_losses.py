"""The two loss terms of vector quantization: one pulls codes to latents, the other latents to codes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def codebook_loss(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, ""]:
    """Mean over all elements of |sg(z) - z_q|^2: pulls codes (through the bridge) to their latents."""
    return jnp.mean(jnp.square(jax.lax.stop_gradient(z) - z_q))


def commitment_loss(z: Float[Array, "*n d"], z_q: Float[Array, "*n d"]) -> Float[Array, ""]:
    """Mean over all elements of |z - sg(z_q)|^2, unweighted: pulls latents to their codes."""
    return jnp.mean(jnp.square(z - jax.lax.stop_gradient(z_q)))
