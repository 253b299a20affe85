"""InceptionV3 as FID and Inception Score use it: the network of 2015-12-05, with the peculiarities of its graph.

Differences from the InceptionV3 of image libraries: 1,008 classes; average pooling that leaves the padding out of the
mean; maximum instead of average pooling in the last block; a bilinear resize that aligns top left corners (TensorFlow
1). Every BatchNorm is folded into the convolution before it, since after training it only scales and shifts. Reading
weight files is left to `interop.inception`. Architecture: arXiv 1512.00567.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

SIDE = 299
CLASSES = 1008
FEATURES = (64, 192, 768, 2048)
SPATIAL, SPATIAL_CHANNELS = "spatial", 7  # name of sFID's features, and how many channels of a layer they are
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
Features = Float[Array, "_ _ _ _"]


class InceptionV3(nn.Module):
    """Features and logits, float32 at full precision.

    The parameters of a convolution are named after it as in the published weights (`Mixed_5b.branch1x1`): kernel [h, w,
    in, out] and bias [out], with the BatchNorm inside; `fc`: kernel [2048, 1008].

    Attributes:
      spatial: whether the features of sFID are returned too.
    """

    spatial: bool = False

    @nn.compact
    def __call__(self, images: UInt8[Array, "b H W 3"]) -> dict[str, Float[Array, "b _"]]:
        """For images of any size, the features `64`, `192`, `768` and `2048`, named by their channels, and logits.

        The features are means over pixels after a stage. `logits_unbiased` [b, 1008] are the logits without the bias of
        the last layer, as the Inception Score uses them. With `spatial` also `spatial` [b, 2023]: the first 7 channels
        of `Mixed_6d.branch1x1` at all 17 x 17 pixels, channels last, which is what the evaluation suite of ADM
        (guided-diffusion) reads from the tensor `mixed_6/conv` for sFID.
        """
        outputs = {}

        def tap(x: Features) -> Features:
            outputs[str(x.shape[-1])] = jnp.mean(x, axis=(1, 2))
            return x

        x = (resize_bilinear(images.astype(jnp.float32), SIDE) - 128) / 128
        x = _conv("Conv2d_1a_3x3", x, 32, (3, 3), strides=2)
        x = _conv("Conv2d_2a_3x3", x, 32, (3, 3), padding="VALID")
        x = _conv("Conv2d_2b_3x3", x, 64, (3, 3))
        x = tap(_halve(x))
        x = _conv("Conv2d_3b_1x1", x, 80)
        x = _conv("Conv2d_4a_3x3", x, 192, (3, 3), padding="VALID")
        x = tap(_halve(x))
        for name, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _block_35(name, x, width)
        x = _block_35_to_17("Mixed_6a", x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = _block_17(name, x, width)
            if self.spatial and name == "Mixed_6d":
                # The output of a block begins with its branch1x1.
                outputs[SPATIAL] = x[..., :SPATIAL_CHANNELS].reshape(len(x), SPATIAL_FEATURES)
        x = _block_17_to_8("Mixed_7a", tap(x))
        x = _block_8("Mixed_7b", x, _mean_pool)
        x = tap(_block_8("Mixed_7c", x, _max_pool))
        logits = nn.Dense(CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(outputs["2048"])
        return outputs | {"logits_unbiased": logits}


def resize_bilinear(images: Float[Array, "b H W c"], side: int) -> Float[Array, "b side side c"]:
    """Resizes as TensorFlow 1 does: output pixel i is interpolated at input position i * H / side, unsmoothed."""
    for axis in (2, 1):
        length = images.shape[axis]
        position = np.arange(side) * (length / side)
        lower = position.astype(np.int32)
        upper = np.minimum(lower + 1, length - 1)
        weight = (position - lower).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
        low, high = jnp.take(images, lower, axis), jnp.take(images, upper, axis)
        images = low + (high - low) * weight
    return images


def _block_35(name: str, x: Features, width: int) -> Features:
    """A block at 35 x 35 pixels; returns 224 + `width` channels."""
    one = _conv(f"{name}.branch1x1", x, 64)
    five = _conv(f"{name}.branch5x5_1", x, 48)
    five = _conv(f"{name}.branch5x5_2", five, 64, (5, 5))
    three = _conv(f"{name}.branch3x3dbl_1", x, 64)
    three = _conv(f"{name}.branch3x3dbl_2", three, 96, (3, 3))
    three = _conv(f"{name}.branch3x3dbl_3", three, 96, (3, 3))
    pooled = _conv(f"{name}.branch_pool", _mean_pool(x), width)
    return jnp.concatenate([one, five, three, pooled], axis=-1)


def _block_35_to_17(name: str, x: Features) -> Features:
    three = _conv(f"{name}.branch3x3", x, 384, (3, 3), strides=2)
    double = _conv(f"{name}.branch3x3dbl_1", x, 64)
    double = _conv(f"{name}.branch3x3dbl_2", double, 96, (3, 3))
    double = _conv(f"{name}.branch3x3dbl_3", double, 96, (3, 3), strides=2)
    return jnp.concatenate([three, double, _halve(x)], axis=-1)


def _block_17(name: str, x: Features, width: int) -> Features:
    """A block at 17 x 17 pixels; 7 x 7 windows are split into 1 x 7 and 7 x 1, with `width` channels inside.

    The 192 channels of `branch1x1` come first in the result.
    """
    one = _conv(f"{name}.branch1x1", x, 192)
    seven = _conv(f"{name}.branch7x7_1", x, width)
    seven = _conv(f"{name}.branch7x7_2", seven, width, (1, 7))
    seven = _conv(f"{name}.branch7x7_3", seven, 192, (7, 1))
    double = _conv(f"{name}.branch7x7dbl_1", x, width)
    double = _conv(f"{name}.branch7x7dbl_2", double, width, (7, 1))
    double = _conv(f"{name}.branch7x7dbl_3", double, width, (1, 7))
    double = _conv(f"{name}.branch7x7dbl_4", double, width, (7, 1))
    double = _conv(f"{name}.branch7x7dbl_5", double, 192, (1, 7))
    pooled = _conv(f"{name}.branch_pool", _mean_pool(x), 192)
    return jnp.concatenate([one, seven, double, pooled], axis=-1)


def _block_17_to_8(name: str, x: Features) -> Features:
    three = _conv(f"{name}.branch3x3_1", x, 192)
    three = _conv(f"{name}.branch3x3_2", three, 320, (3, 3), strides=2)
    seven = _conv(f"{name}.branch7x7x3_1", x, 192)
    seven = _conv(f"{name}.branch7x7x3_2", seven, 192, (1, 7))
    seven = _conv(f"{name}.branch7x7x3_3", seven, 192, (7, 1))
    seven = _conv(f"{name}.branch7x7x3_4", seven, 192, (3, 3), strides=2)
    return jnp.concatenate([three, seven, _halve(x)], axis=-1)


def _block_8(name: str, x: Features, pool: Callable[[Features], Features]) -> Features:
    """A block at 8 x 8 pixels; the two such blocks differ in their pooling."""
    one = _conv(f"{name}.branch1x1", x, 320)
    three = _conv(f"{name}.branch3x3_1", x, 384)
    double = _conv(f"{name}.branch3x3dbl_1", x, 448)
    double = _conv(f"{name}.branch3x3dbl_2", double, 384, (3, 3))
    branches = [one]
    for stem, wide, high in ((three, "branch3x3_2a", "branch3x3_2b"), (double, "branch3x3dbl_3a", "branch3x3dbl_3b")):
        branches += [_conv(f"{name}.{wide}", stem, 384, (1, 3)), _conv(f"{name}.{high}", stem, 384, (3, 1))]
    pooled = _conv(f"{name}.branch_pool", pool(x), 192)
    return jnp.concatenate([*branches, pooled], axis=-1)


def _conv(
    name: str, x: Features, width: int, window: tuple[int, int] = (1, 1), strides: int = 1, padding: str = "SAME"
) -> Features:
    """Convolution and ReLU, a submodule of the network; with strides nothing is padded."""
    padding = "VALID" if strides > 1 else padding
    convolution = nn.Conv(width, window, strides, padding, precision=jax.lax.Precision.HIGHEST, name=name)
    return nn.relu(convolution(x))


def _halve(x: Features) -> Features:
    return nn.max_pool(x, (3, 3), (2, 2))


def _mean_pool(x: Features) -> Features:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x: Features) -> Features:
    return nn.max_pool(x, (3, 3), padding="SAME")
