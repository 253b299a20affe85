"""The quick evaluation, in training and by `main --mode=eval`: pixels and codes over a fixed set, on any mesh.

`evals.suite`, behind `fvq_jax.evaluate`, adds what needs other networks, and the published protocol.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from fvq_jax.errors import InputError
from fvq_jax.evals.image_metrics import to_uint8
from fvq_jax.ops.code_statistics import perplexity, usage
from fvq_jax.sharding import global_batch


@struct.dataclass
class Evaluation:
    """The result over the whole set.

    Attributes:
      scalars: means over images (`psnr`, `ssim`, `l1`, `mse`), `usage` and `perplexity` over all `tokens`,
        and the number of `images` and `tokens`.
      code_counts: int [k], how often each code was chosen.
      originals, reconstructions: the first images, uint8 [b, H, W, 3], of this process.
    """

    scalars: dict[str, float]
    code_counts: np.ndarray
    originals: np.ndarray
    reconstructions: np.ndarray


def evaluate(
    eval_step: Callable[[Any, dict[str, jax.Array]], Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    keep_images: int = 8,
) -> Evaluation:
    """Runs a task's jitted `eval_step` over `batches` and adds up; padding and unreadable files count for nothing.

    The step's sums are over the global batch, so every process gets the same figures.

    Raises:
      InputError: not a single image could be read.
    """
    total, originals, reconstructions = None, None, None
    for batch in batches:
        sums, images = eval_step(params, global_batch(batch, mesh))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        if originals is None:
            originals = batch["image"][batch["mask"]][:keep_images]
            rows = np.concatenate([np.asarray(s.data) for s in _local_rows(images)])
            rows = np.asarray(to_uint8(rows))
            reconstructions = rows[batch["mask"]][:keep_images]
    images = 0 if total is None else int(total.images)
    if images == 0:
        raise InputError("the evaluation set has no readable image")
    counts = np.asarray(total.code_counts)
    scalars = {name: float(value) / images for name, value in total.scalars.items()}
    scalars |= {"usage": float(usage(counts)), "perplexity": float(perplexity(counts))}
    scalars |= {"images": images, "tokens": int(counts.sum())}
    return Evaluation(scalars, counts, originals, reconstructions)


def _local_rows(images: jax.Array) -> list[Any]:
    """This process's shards in the order of their rows."""
    return sorted(images.addressable_shards, key=lambda shard: shard.index[0].start or 0)
