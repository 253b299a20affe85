"""Scores a trained tokenizer on a set of pictures with everything there is: the evaluation for results to quote.

One pass, in which nothing is kept per picture. Every metric is a sum over pictures; padding and unreadable files are
left out of it, and hosts, each with its share of the pictures, add their sums at the end. The quick evaluation inside
training is `evals.evaluate`; both use the same image metrics and code statistics.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from fvq_jax.data.pipeline import eval_batches
from fvq_jax.data.sources import Source
from fvq_jax.errors import InputError
from fvq_jax.evals.frechet import FeatureStatistics, frechet_distance
from fvq_jax.evals.hosts import sum_over_hosts
from fvq_jax.evals.image_file import ImageWriter
from fvq_jax.evals.image_metrics import SSIM_WINDOW, l1, mse, psnr, ssim, to_uint8
from fvq_jax.evals.networks import Networks
from fvq_jax.evals.protocol import Unresized, as_scored
from fvq_jax.evals.reference import Moments
from fvq_jax.evals.row_parallel import RowParallel
from fvq_jax.evals.scores import SPLITS, InceptionScore, code_statistics
from fvq_jax.models.inception import CLASSES, FEATURES
from fvq_jax.ops.code_statistics import perplexity, usage
from fvq_jax.pretrained import Tokenizer

RFID_FEATURES = FEATURES[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sums:
    """What one pass adds up, in 64 bits.

    Attributes:
      images: how many pictures.
      skipped: how many unreadable files.
      scalars: the sum over pictures of each metric of single pictures.
      code_counts: how often each code was chosen [k].
      real, decoded: features of crops and of reconstructions; `inception_score`: of reconstructions. None without
        InceptionV3, `real` also if the reference is known.
    """

    images: np.int64
    skipped: np.int64
    scalars: dict[str, Any]
    code_counts: Int64[np.ndarray, "k"]
    real: FeatureStatistics | None
    decoded: FeatureStatistics | None
    inception_score: InceptionScore | None


def collect(
    tokenizer: Tokenizer,
    source: Source,
    networks: Networks,
    *,
    protocol: str,
    size: int,
    batch_size: int,
    images: int = 0,
    with_reference: bool = True,
    writer: ImageWriter | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> Sums:
    """One pass over the pictures, over all hosts: every host gets the whole sums.

    Args:
      tokenizer: encodes and decodes on all local devices.
      source: the pictures; all, or `images` of them, evenly spaced.
      networks: which metrics beyond pixels to compute.
      protocol: a name in `PROTOCOLS`.
      size: side of the crops, a multiple of the down-sampling.
      batch_size: pictures at a time, of all hosts.
      with_reference: whether to collect the statistics of the crops.
      writer: gets the reconstructions of this host, as scored.
      progress: called after every batch with how many pictures all hosts have seen since the last call.

    Raises:
      InputError: no picture can be read or over 1 % cannot, sizes do not fit, or a reconstruction is not finite.
    """
    if size < 1 or size % tokenizer.downsampling:
        raise InputError(f"--size {size} is not divisible by the down-sampling of {tokenizer.downsampling}")
    count = min(images or len(source), len(source))
    index, hosts = jax.process_index(), jax.process_count()
    batches = eval_batches(
        Unresized(source, size) if protocol == "published" else source,
        image_size=size,
        batch_size=batch_size,
        limit=images,
        process_index=index,
        process_count=hosts,
    )
    pixel_metrics = RowParallel(_pixel_metrics, ())
    sums = _no_sums(tokenizer, networks, with_reference)
    try:
        for step, batch in enumerate(batches):
            mask, crops = batch["mask"], batch["image"]
            codes = tokenizer.encode(crops)
            decoded = tokenizer.decode(codes)
            if not np.isfinite(decoded).all():
                raise InputError(f"the reconstructions of {tokenizer} are not finite: its weights are broken")
            real, decoded = (as_scored(pixels, protocol) for pixels in (crops, np.asarray(to_uint8(decoded))))
            scalars = pixel_metrics(real, decoded)
            scalars |= {name: distance(real, decoded) for name, distance in networks.lpips.items()}
            for name, values in scalars.items():
                sums.scalars[name] = sums.scalars.get(name, 0.0) + values[mask].sum(dtype=np.float64)
            sums.images += mask.sum()
            sums.code_counts += np.bincount(codes[mask].reshape(-1), minlength=len(sums.code_counts))
            if networks.inception is not None:
                # Before the mask, so that the last batch has the shape of the others.
                outputs = networks.inception(decoded)
                sums.decoded.add(outputs[str(RFID_FEATURES)][mask])
                first = (step * hosts + index) * len(mask)
                split = (first + np.arange(len(mask))) * SPLITS // count
                sums.inception_score.add(outputs["logits_unbiased"][mask], split[mask])
                if sums.real is not None:
                    sums.real.add(networks.inception(real)[str(RFID_FEATURES)][mask])
            if writer is not None:
                writer.write(decoded[mask])
            progress(min(batch_size, count - step * batch_size))
    finally:
        batches.close()
    sums.skipped += len(batches.skipped)
    sums = sum_over_hosts(sums)
    if not sums.images:
        raise InputError("the evaluation set has no readable picture")
    return sums


def summarise(sums: Sums, tokenizer: Tokenizer, reference: Moments | None) -> dict[str, float | int]:
    """Every metric by name. `reference`: mean and covariance of the crops' features, if rFID can be computed.

    `psnr`, `ssim`, `l1`, `mse` (data range 1) and `lpips_*` are means over pictures; `usage`, `perplexity` and those
    of `code_statistics` count the tokens of the whole set.
    """
    metrics = {name: float(value / sums.images) for name, value in sums.scalars.items()}
    if reference is not None and sums.decoded is not None:
        metrics["rfid"] = frechet_distance(reference, sums.decoded.moments())
    if sums.inception_score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = sums.inception_score.result()
    counts = sums.code_counts
    metrics |= {"usage": float(usage(counts)), "perplexity": float(perplexity(counts))}
    return metrics | code_statistics(counts, tokenizer.downsampling**2)


def not_computed(networks: Networks, sums: Sums) -> dict[str, str]:
    """Which metrics `summarise` leaves out, and why."""
    missing = dict(networks.not_computed)
    if "ssim" not in sums.scalars:
        missing["ssim"] = f"needs pictures of at least {SSIM_WINDOW} pixels"
    if sums.decoded is not None and sums.images < 2:
        missing["rfid"] = "needs at least 2 pictures"
    return missing


def _pixel_metrics(params: tuple[()], a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    """Of uint8 images, each pair for itself."""
    a, b = a.astype(jnp.float32) / 255, b.astype(jnp.float32) / 255
    metrics = {"psnr": psnr, "l1": l1, "mse": mse}
    if min(a.shape[1:3]) >= SSIM_WINDOW:
        metrics["ssim"] = ssim
    return {name: metric(a, b) for name, metric in metrics.items()}


def _no_sums(tokenizer: Tokenizer, networks: Networks, with_reference: bool) -> Sums:
    features = networks.inception is not None
    return Sums(
        images=np.int64(0),
        skipped=np.int64(0),
        scalars={},
        code_counts=np.zeros(tokenizer.net.codebook_size, np.int64),
        real=FeatureStatistics.empty(RFID_FEATURES) if features and with_reference else None,
        decoded=FeatureStatistics.empty(RFID_FEATURES) if features else None,
        inception_score=InceptionScore.empty(CLASSES) if features else None,
    )
