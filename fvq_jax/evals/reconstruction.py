"""Scores a tokenizer on a set of pictures. Training and `fvq_jax.evaluate` share this evaluation.

It makes one pass over the pictures. Every metric is a sum over them, without padding and unreadable files. Each host
sums over its share of the pictures, and the sums of all hosts are added at the end. Beside the sums it keeps a few
pictures to look at (`evals.examples`), and for every code the first picture that it was chosen for. Without networks
only pixels and codes are scored: the quick evaluation during training. The caller encodes and decodes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Int64, UInt8

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.npz_rows import ImageWriter
from fvq_jax.data.pipeline import eval_batches
from fvq_jax.data.prefetch import Prefetch
from fvq_jax.data.record import Source
from fvq_jax.data.unreadable import MAX_UNREADABLE
from fvq_jax.evals.examples import ExampleCollector, Examples
from fvq_jax.evals.frechet import FeatureStatistics, frechet_distance
from fvq_jax.evals.inception_score import SPLITS, InceptionScore
from fvq_jax.evals.networks import Networks
from fvq_jax.evals.pixel_metrics import SSIM_WINDOW, l1, mse, psnr, ssim
from fvq_jax.evals.protocol import CROPS, PROTOCOLS, WHEN_SMALL, as_scored
from fvq_jax.evals.reference import Moments
from fvq_jax.models.frozen.inception import CLASSES, FEATURES
from fvq_jax.ops.code_usage import code_statistics, level_statistics, perplexity, position_statistics, usage
from fvq_jax.ops.pixels import to_uint8, to_unit
from fvq_jax.runtime.agreement import everywhere
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.hosts import min_over_hosts, rows_of_all_hosts, sum_over_hosts
from fvq_jax.runtime.row_parallel import RowParallel

RFID_FEATURES = FEATURES[-1]
NEVER = np.iinfo(np.int64).max  # in `first_use`: the code was never chosen


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """What a tokenizer makes of a batch of pictures, on the host.

    Attributes:
      images: in [-1, 1].
      codes: of any shape that the quantizer gives.
      error, power: the quantization error and what it is a part of, see `models.tokenizer.quantization_error`.
    """

    images: Float[np.ndarray, "b H W 3"]
    codes: Int[np.ndarray, "b ..."]
    error: Float[np.ndarray, "b"]
    power: Float[np.ndarray, "b"]


# uint8 pictures of this host and their classes
Reconstruct = Callable[[UInt8[np.ndarray, "b H W 3"], Int[np.ndarray, "b"]], Reconstructed]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sums:
    """What one pass adds up, in 64 bits.

    Attributes:
      images: how many pictures.
      broken: how many pictures have a reconstruction that is not finite; their scores are NaN.
      skipped: how many unreadable files.
      small: how many pictures have a side that is shorter than the crop.
      scalars: the sum over pictures of each metric of single pictures.
      error, power: sums over pictures of the quantization error and of what it is a part of.
      code_counts: how often each code was chosen, on each level [l, k].
      real, decoded: statistics of the features of crops and of reconstructions.
      inception_score: that of the reconstructions. These three are None without InceptionV3; `real` is None also if the
        statistics of the crops are known already.
    """

    images: np.int64
    broken: np.int64
    skipped: np.int64
    small: np.int64
    scalars: dict[str, Any]
    error: np.float64
    power: np.float64
    code_counts: Int64[np.ndarray, "l k"]
    real: FeatureStatistics | None
    decoded: FeatureStatistics | None
    inception_score: InceptionScore | None


@dataclasses.dataclass(frozen=True)
class Found:
    """What one pass over the pictures found; the same on every host.

    Attributes:
      sums: the sums over the pictures.
      count: how many pictures it went through, unreadable ones included.
      first_use: for each code [k] the position of the first picture that it was chosen for, or `NEVER`.
      examples: pictures to look at.
    """

    sums: Sums
    count: int
    first_use: Int64[np.ndarray, "k"]
    examples: Examples


def collect(
    reconstruct: Reconstruct,
    source: Source,
    networks: Networks,
    *,
    codebook_size: int,
    level_of: Int[np.ndarray, "..."],
    size: int,
    batch_size: int,
    protocol: str = "direct",
    images: int = 0,
    num_workers: int = 0,
    timeout: float = 0.0,
    max_unreadable: float | int = MAX_UNREADABLE,
    keep_images: int = 12,
    with_reference: bool = True,
    writer: ImageWriter | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> Found:
    """One pass over the pictures, over all hosts.

    Args:
      reconstruct: encodes and decodes; the class of a row that does not count is 0.
      source: the pictures; all, or `images` of them, in the order of `data.evaluation_set.Sample`.
      networks: which metrics beyond pixels to compute.
      codebook_size: how many codes there are.
      level_of: the level of every code of a picture, see `Quantizer.level_of`.
      size: side of the crops.
      batch_size: pictures at a time, of all hosts.
      protocol: a name in `PROTOCOLS`.
      num_workers: processes that read pictures, on every host; 0: threads.
      timeout: seconds without a batch after which the pass ends, five times as many at the start; 0: no limit.
      max_unreadable: how many pictures may be unreadable, see `data.unreadable.allowed`.
      keep_images: how many pictures spread over the set to keep as examples.
      with_reference: whether to collect the statistics of the crops.
      writer: gets the reconstructions of all hosts, as scored, in the order of the pictures; give one on every host or
        on none.
      progress: called after every batch with how many pictures all hosts have seen since the last call.

    Raises:
      InputError: no picture can be read, or more cannot than may.
      DataError: no batch came for `timeout` seconds, or a process that reads them has died; RunError if that happened
        on another host.
    """
    sample = Sample(source, min(images or len(source), len(source)))
    count = len(sample)
    index, hosts = jax.process_index(), jax.process_count()
    batches = eval_batches(
        sample,
        image_size=size,
        batch_size=batch_size,
        crop=CROPS[protocol],
        process_index=index,
        process_count=hosts,
        num_workers=num_workers,
        max_unreadable=max_unreadable,
        pictures=source.pictures if isinstance(source, RandomCrops) else count,
    )
    prefetched = Prefetch(batches, lambda batch: batch, timeout=timeout)
    level_of = level_of.reshape(-1)
    sums = _no_sums((int(level_of.max()) + 1, codebook_size), networks, with_reference)
    first_use = np.full(codebook_size, NEVER)
    examples = ExampleCollector(keep_images, count, sample.name)
    try:
        for step, batch in enumerate(_on_all_hosts(prefetched)):
            mask, crops = batch["mask"], batch["image"]
            found = reconstruct(crops, batch["label"])
            decoded, codes = found.images, found.codes
            broken = mask & ~np.isfinite(decoded).all(axis=(1, 2, 3))
            real, decoded = (as_scored(pixels, protocol) for pixels in (crops, np.asarray(to_uint8(decoded))))
            scores = _PIXEL_METRICS(real, decoded)
            scores |= {name: distance(real, decoded) for name, distance in networks.lpips.items()}
            # NaN and not a score: in 8 bits a pixel that is not a number is black.
            scores = {name: np.where(broken, np.nan, values)[mask] for name, values in scores.items()}
            for name, values in scores.items():
                sums.scalars[name] = sums.scalars.get(name, 0.0) + values.sum(dtype=np.float64)
            sums.images += mask.sum()
            sums.broken += broken.sum()
            sums.small += batch["small"].sum()
            positions = (step * hosts + index) * len(mask) + np.flatnonzero(mask)
            codes = codes.reshape(len(mask), -1)[mask]
            sums.error += found.error[mask].sum(dtype=np.float64)
            sums.power += found.power[mask].sum(dtype=np.float64)
            numbered = (level_of * codebook_size + codes).reshape(-1)
            sums.code_counts += np.bincount(numbered, minlength=sums.code_counts.size).reshape(sums.code_counts.shape)
            np.minimum.at(first_use, codes, positions[:, None])
            examples.add(positions, scores, real[mask], decoded[mask])
            if networks.inception and sums.decoded and sums.inception_score:
                # Before the mask, so that the last batch has the shape of the others.
                outputs = networks.inception(decoded)
                sums.decoded.add(outputs[str(RFID_FEATURES)][mask])
                sums.inception_score.add(outputs["logits_unbiased"][mask], positions * SPLITS // count)
                if sums.real is not None:
                    sums.real.add(networks.inception(real)[str(RFID_FEATURES)][mask])
            if writer is not None:
                writer.write(rows_of_all_hosts(decoded)[rows_of_all_hosts(mask)])
            progress(min(batch_size, count - step * batch_size))
    finally:
        prefetched.close()
    sums.skipped += len(batches.skipped)
    sums = sum_over_hosts(sums)
    if not sums.images:
        raise InputError("the evaluation set has no readable picture")
    return Found(sums, count, min_over_hosts(first_use), examples.result(size))


def _on_all_hosts(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """This host's batches; all hosts have equally many. What ends them on one host ends them on all."""
    while (batch := everywhere(lambda: next(batches, None))) is not None:
        yield batch


def conditions(found: Found, source: Source, *, data: str, protocol: str, size: int) -> dict[str, str | int]:
    """What was scored and how, to stand beside every figure; `data` is what to call the source."""
    sums, means, crops = found.sums, PROTOCOLS[protocol], 0
    images = different = int(sums.images)
    if isinstance(source, RandomCrops):
        crops, different, (_, _, scored_as) = source.count, source.pictures, means.partition("; ")
        different = min(images, max(1, different - int(sums.skipped)))  # several hosts may have skipped the same one
        means = f"{crops:,} random crops as in training, seed {source.seed}; {scored_as}"
    return {
        "data": data,
        "pictures": source.fingerprint(),
        "protocol": protocol,
        "protocol_means": means,
        "random_crops": crops,
        "size": size,
        "images": images,
        "different_pictures": different,
        "skipped_files": int(sums.skipped),
        f"{WHEN_SMALL[protocol]}_pictures": int(sums.small),
        "tokens": int(sums.code_counts.sum()),
        "codebook_size": sums.code_counts.shape[1],
    }


def summarise(
    sums: Sums,
    pixels: int,
    choices: int,
    reference: Moments | None = None,
    levels: Sequence[str] = (),
    positions: Int[np.ndarray, "k"] | None = None,
) -> dict[str, float | int]:
    """Every metric by name.

    `psnr`, `ssim`, `l1`, `mse` (data range 1) and `lpips_*` are means over pictures, `quantization_error` and the
    relative one over latents; `usage`, `perplexity` and those of `code_statistics` count the tokens of the whole set
    and of all levels together, those of `level_statistics` of one level and
    those of `position_statistics` of one position.

    Args:
      sums: of the pass.
      pixels: of a picture.
      choices: from how many codes each code is chosen, see `Quantizer.choices`.
      reference: mean and covariance of the crops' features, if rFID can be computed.
      levels: their names, if the quantizer has several.
      positions: of every code in its group, see `Quantizer.positions`; None if that is not of interest.
    """
    metrics = {name: float(value / sums.images) for name, value in sums.scalars.items()}
    if reference is not None and sums.decoded is not None:
        metrics["rfid"] = frechet_distance(reference, sums.decoded.moments())
    if sums.inception_score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = sums.inception_score.result()
    if sums.broken:
        metrics |= dict.fromkeys(metrics.keys() & {"rfid", "inception_score", "inception_score_std"}, math.nan)
    metrics["quantization_error"] = float(sums.error / sums.images)
    metrics["relative_quantization_error"] = float(sums.error / sums.power) if sums.power else math.nan
    counts = sums.code_counts.sum(axis=0)
    metrics |= {"usage": float(usage(counts)), "perplexity": float(perplexity(counts))}
    metrics |= code_statistics(counts, float(pixels * sums.images / counts.sum()), choices)
    if positions is not None:
        metrics |= position_statistics(counts, positions)
    return metrics | level_statistics(sums.code_counts, levels, choices)


def not_computed(networks: Networks, sums: Sums) -> dict[str, str]:
    """Which metrics `summarise` leaves out, and why."""
    missing = dict(networks.not_computed)
    if "ssim" not in sums.scalars:
        missing["ssim"] = f"needs pictures of at least {SSIM_WINDOW} pixels"
    if sums.decoded is not None and sums.images < 2:
        missing["rfid"] = "needs at least 2 pictures"
    return missing


def _pixel_metrics(params: tuple[()], a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    """The metrics of each pair of uint8 images."""
    a, b = to_unit(a), to_unit(b)
    metrics = {"psnr": psnr, "l1": l1, "mse": mse}
    if min(a.shape[1:3]) >= SSIM_WINDOW:
        metrics["ssim"] = ssim
    return {name: metric(a, b) for name, metric in metrics.items()}


# One for all evaluations of a run, which compile it once. XLA takes 40 bytes for each value of a picture.
_PIXEL_METRICS = RowParallel(_pixel_metrics, (), bytes_per_value=40)


def _no_sums(code_counts: tuple[int, int], networks: Networks, with_reference: bool) -> Sums:
    features = networks.inception is not None
    return Sums(
        images=np.int64(0),
        broken=np.int64(0),
        skipped=np.int64(0),
        small=np.int64(0),
        scalars={},
        error=np.float64(0),
        power=np.float64(0),
        code_counts=np.zeros(code_counts, np.int64),
        real=FeatureStatistics.empty(RFID_FEATURES) if features and with_reference else None,
        decoded=FeatureStatistics.empty(RFID_FEATURES) if features else None,
        inception_score=InceptionScore.empty(CLASSES) if features else None,
    )
