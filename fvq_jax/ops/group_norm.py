"""Group normalisation, and the activation that follows it, with their gradient in closed form.

For the gradient the input is kept, and one mean and one scale for every channel of an image. Automatic differentiation
keeps several arrays as large as the input and reads each of them again (docs/results.md, "Training step").
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
    x: Float[Array, "b H W c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    groups: int,
    epsilon: float,
    swish: bool = False,
) -> Float[Array, "b H W c"]:
    """Normalises over height, width and the channels of each of `groups` groups, then applies swish if asked.

    The result has the type of x; everything between is float32. Source: arXiv 1803.08494.
    """
    return _forward(x, scale, bias, groups, epsilon, swish)[0]


def _forward(x, scale, bias, groups, epsilon, swish):
    scale, bias = (y[None, None, None] for y in (scale, bias))
    mean = _mean_of_groups(_sums(x.astype(jnp.float32)), x.shape, groups)
    variance = _mean_of_groups(_sums(jnp.square(x - mean)), x.shape, groups)  # E[x^2] - E[x]^2 would lose digits
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (x - mean) * inverse * scale + bias
    return (jax.nn.swish(y) if swish else y).astype(x.dtype), (x, scale, bias, mean, inverse)


def _backward(groups, epsilon, swish, kept, gradient):
    x, scale, bias, mean, inverse = kept
    gradient = gradient.astype(jnp.float32)
    normal = (x - mean) * inverse
    if swish:
        y = normal * scale + bias
        gate = jax.nn.sigmoid(y)
        gradient *= gate * (1 + y * (1 - gate))
    of_bias, of_scale = _sums(gradient), _sums(gradient * normal)  # of every image: each array is read once
    # What only shifts or stretches a whole group does not change the result.
    shift, stretch = (_mean_of_groups(scale * y, x.shape, groups) for y in (of_bias, of_scale))
    of_x = inverse * (scale * gradient - shift - stretch * normal)
    return of_x.astype(x.dtype), of_scale.sum((0, 1, 2)), of_bias.sum((0, 1, 2))


group_norm.defvjp(_forward, _backward)


def _sums(x):
    """Sums over height and width, [b, 1, 1, c]. Summing channels alone first keeps what is read together contiguous."""
    return x.sum((1, 2), keepdims=True)


def _mean_of_groups(sums, shape, groups):
    """The mean over a group for each of its channels, from the sums of [b, H, W, c] = `shape` over height and width."""
    b, H, W, c = shape
    means = sums.reshape(b, groups, c // groups).sum(-1) / (H * W * c // groups)
    return jnp.repeat(means, c // groups, axis=-1)[:, None, None]
