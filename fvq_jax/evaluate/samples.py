"""Scores generated pictures against real ones, as ADM's evaluation suite does: what `--samples` and `--generator` ask.

`evals.generation` computes the scores, and `report.generator` makes the page.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from fvq_jax.data.npz_rows import ImageReader
from fvq_jax.data.stored_pictures import StoredPictures, open_real, open_samples
from fvq_jax.evals import generation
from fvq_jax.evals.frechet import biased
from fvq_jax.evals.generation import Inception, PictureSet, Reference
from fvq_jax.evals.inception import load_inception
from fvq_jax.evals.precision_recall import DISTANCES, check_enough, pairs
from fvq_jax.evals.reference import read_statistics
from fvq_jax.evaluate.drawn import DrawnPictures
from fvq_jax.inference.generator import Generator, Sampling
from fvq_jax.interop.inception import WHERE
from fvq_jax.ops.pixels import ROUNDINGS
from fvq_jax.ops.sampling import SCHEDULES
from fvq_jax.report.generator import GeneratorReport, SampleSet, best_of, first_of_classes, write_generator_report
from fvq_jax.runtime.agreement import everywhere
from fvq_jax.runtime.arguments import listed_paths, some_path, some_text
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.files import json_text, make_folder, write_whole
from fvq_jax.runtime.hosts import sum_over_hosts

METRICS = "metrics.json"
# Options of samples in general, and of those that are drawn while they are scored.
OF_SAMPLES = ("reference", "distances", "guidance")
OF_DRAWING = ("count", "temperature", "top_k", "top_p", "schedule", "rounding")
COUNT = 50_000
_PICTURES = 48  # on the page, if their classes are not known


@dataclasses.dataclass(frozen=True)
class _Set:
    """Pictures to score: what to call them, and their guidance if known."""

    name: str
    pictures: StoredPictures
    guidance: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only the scoring of samples has."""
    group = parser.add_argument_group("samples of a generator")
    group.add_argument("--generator", metavar="PATH", type=some_path, help="draw samples of it; needs --tokenizer")
    group.add_argument(
        "--reference",
        type=some_text,
        help="real pictures: .npz of ADM's suite (statistics, pictures or both), a folder of pictures or of prepared "
        "ArrayRecord files, or photos",
    )
    group.add_argument(
        "--distances",
        choices=DISTANCES,
        default="float32",
        help="of precision and recall; "
        + "; ".join(f"{name}: {meaning}" for name, meaning in DISTANCES.items())
        + " (default: float32)",
    )
    group.add_argument(
        "--guidance",
        help="with --generator: draw a set of samples for each of these values, such as 1,1.5,2 (default: 1.75); with "
        "--samples: with which each file was drawn, for the page",
    )
    group.add_argument("--count", type=int, default=COUNT, help="samples for each guidance (default: %(default)s)")
    for name, kind, means in (
        ("temperature", float, "what the logits are divided by; 0: always the likeliest code"),
        ("top_k", int, "draw from so many of the likeliest codes; 0: from all"),
        ("top_p", float, "draw from the likeliest codes that together have this probability"),
    ):
        default = getattr(Sampling(), name)
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{means} (default: %(default)s)")
    group.add_argument("--schedule", choices=SCHEDULES, default=Sampling().schedule, help="of the guidance")
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="round",
        help="; ".join(f"{name}: {meaning}" for name, meaning in ROUNDINGS.items()) + " (default: round)",
    )


def evaluate_samples(args: argparse.Namespace) -> dict[str, Any]:
    """Writes `metrics.json` and the page. Returns the content of the first; {} in all processes but the first.

    The scores at the top are those of the best set of samples, by FID; with several, `sets` holds those of each.

    Raises:
      InputError: for bad input.
    """
    sets, inception = everywhere(lambda: _prepare(args))
    first = jax.process_index() == 0
    reference, about = _reference(args, sets, inception, first)
    missing = generation.not_computed(reference)
    for metric, reason in missing.items() if first else ():  # now, and not after hours
        sys.stderr.write(f"fvq_jax: not computed: {metric}: {reason}\n")
    scored = []
    for one in sets:
        samples, pictures, captions = _collect(one, inception, args.batch, reference.images is not None, first)
        total = pairs(reference.images, samples.images) if reference.images else 0
        with tqdm(total=total, unit=" pairs", unit_scale=True, desc="precision and recall", disable=not first) as bar:
            scores = generation.compare(samples, reference, distances=args.distances, progress=bar.update)
        scored.append(SampleSet(one.name, scores, samples.images, one.guidance, pictures, captions))
    if not first:
        return {}
    pixels = args.rounding if args.generator else "stored"
    facts = {
        "generator" if args.generator else "files": str(args.generator or args.samples),
        **({"tokenizer": str(args.tokenizer), **_drawing(args, sets[0].pictures)} if args.generator else {}),
        "size": sets[0].pictures.shape[1],
        **about,
        **generation.protocol(args.distances, pixels),
        **_warnings(sets),
    }
    best = best_of(scored)
    assert best is not None
    metrics = facts | _figures(best, reference) | {"not_computed": missing}
    if len(scored) > 1:
        metrics |= {"best": best.name, "sets": [{"name": one.name, **_figures(one, reference)} for one in scored]}
    write_whole(args.out / METRICS, json_text(metrics, indent=2) + "\n")  # first: the page only shows it
    title = _title(args, sets)
    write_generator_report(args.out, GeneratorReport(title, facts, samples=scored, not_computed=missing))
    return metrics


def _prepare(args: argparse.Namespace) -> tuple[list[_Set], Inception]:
    """Checks the options and opens what they name; InputError for whatever cannot work."""
    require(args.batch >= 1, f"--batch must be at least 1, not {args.batch}")
    require(0 <= args.seed < 2**32, f"--seed must be in 0..{2**32 - 1}, not {args.seed}")
    require(args.reference is not None, "--reference is missing: give the real pictures, or ADM's reference file")
    require(args.inception is not None, f"--inception is missing: get {WHERE} and pass --inception=FILE")
    require(args.batch % jax.process_count() == 0, "--batch must be a multiple of the number of processes")
    make_folder(args.out)  # before hours of work, not after
    sets = _drawn(args) if args.generator else _stored(args)
    for one in sets:
        check_enough(len(one.pictures), f"samples in {one.name}")
    return sets, load_inception(args.inception, spatial=True)


def _stored(args: argparse.Namespace) -> list[_Set]:
    paths = listed_paths(args.samples)
    require(bool(paths), "--samples is empty: give files or folders, separated by commas")
    guidances = _guidances(args.guidance)
    if guidances and len(guidances) != len(paths):
        raise InputError(f"--guidance has {len(guidances)} values for {len(paths)} sets of samples")
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    if len(set(names)) < len(names):
        names = paths
    return [
        _Set(name, open_samples(path), guidances[index] if guidances else None)
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]


def _drawn(args: argparse.Namespace) -> list[_Set]:
    guidances = _guidances(args.guidance) or [float(Sampling().guidance)]
    require(args.count >= 1, f"--count must be at least 1, not {args.count}")
    rest = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "schedule")}
    for guidance in guidances:
        Sampling(guidance=guidance, **rest).check()
    generator = Generator.from_pretrained(args.generator, tokenizer=args.tokenizer)
    sets = []
    for guidance in guidances:
        options = {"guidance": guidance, **rest}
        condition = generator.check_sampling(Sampling(**options), args.condition)  # now, and not after hours
        drawn = DrawnPictures(generator, args.count, args.seed, options | {"condition": condition}, args.rounding)
        sets.append(_Set(f"guidance {guidance:g}", drawn, guidance))
    return sets


def _guidances(text: str | None) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise InputError(f"--guidance must be numbers such as 1,1.5,2, not {text!r}") from error
    require(all(map(math.isfinite, values)), f"--guidance must be finite numbers such as 1,1.5,2, not {text!r}")
    return values


def _reference(
    args: argparse.Namespace, sets: Sequence[_Set], inception: Inception, first: bool
) -> tuple[Reference, dict[str, Any]]:
    """The real pictures, and facts about them."""
    height, width = sets[0].pictures.shape[1:3]
    path = args.reference
    known = None
    if path.endswith(".npz") and not os.path.isdir(path):
        known = everywhere(lambda: read_statistics(path))
        real: StoredPictures | None = everywhere(
            lambda: None if known and not _has_pictures(path) else ImageReader(path)
        )
    else:
        require(height == width, f"samples of {width} x {height} pixels cannot be compared with square crops of {path}")
        real = everywhere(lambda: open_real(path, height))
    about: dict[str, Any] = {"reference": path}
    for one in sets:
        size = one.pictures.shape[1:3]
        if size != (real.shape[1:3] if real is not None else (height, width)):
            other = path if real is not None else sets[0].name
            other_size = real.shape[1:3] if real is not None else (height, width)
            raise InputError(
                f"{one.name} has pictures of {size[1]} x {size[0]} pixels and {other} of {other_size[1]} x "
                f"{other_size[0]}: sizes must be equal"
            )
    if real is None:
        assert known is not None
        return Reference(*known, None), about | {"reference_statistics": "read from the file"}
    check_enough(len(real), "reference pictures")
    found = _pass(real, f"features of {path}", inception, args.batch, True, first)
    if known is None:
        return Reference.of(found), about | {"reference_statistics": "of these pictures"}
    pooled, spatial = known
    about["reference_statistics"] = "read from the file; its pictures serve precision and recall"
    return Reference(pooled, spatial, found.features), about


def _has_pictures(path: str) -> bool:
    with np.load(path) as arrays:
        return "arr_0" in arrays


def _collect(
    one: _Set, inception: Inception, batch: int, keep: bool, first: bool
) -> tuple[PictureSet, UInt8[np.ndarray, "n H W 3"], tuple[str, ...]]:
    """The statistics of a set, and some of its pictures with their captions."""
    positions, captions = _to_show(one.pictures)
    shown = np.zeros((len(positions), *one.pictures.shape[1:]), np.uint8)
    local, hosts, host = batch // jax.process_count(), jax.process_count(), jax.process_index()
    wanted = {position: row for row, position in enumerate(positions)}

    def watch(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for step, images in enumerate(batches):
            start = (step * hosts + host) * local
            for offset, image in enumerate(images):
                if start + offset in wanted:
                    shown[wanted[start + offset]] = image
            yield images

    found = _pass(one.pictures, f"scoring {one.name}", inception, batch, keep, first, watch)
    return found, sum_over_hosts(shown), captions


def _pass(
    pictures: StoredPictures,
    what: str,
    inception: Inception,
    batch: int,
    keep: bool,
    first: bool,
    watch: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]] = lambda batches: batches,
) -> PictureSet:
    local, hosts, host = batch // jax.process_count(), jax.process_count(), jax.process_index()
    batches = pictures.batches(local, part=host, parts=hosts)
    with tqdm(total=len(pictures), unit=" images", desc=what, disable=not first) as bar:
        return generation.collect(
            watch(batches),
            inception,
            images=len(pictures),
            batch_size=local,
            keep_features=keep,
            progress=lambda done: bar.update(min(done * hosts, bar.total - bar.n)),
        )


def _to_show(pictures: StoredPictures) -> tuple[list[int], tuple[str, ...]]:
    """Positions of the pictures for the page, with a caption each if their classes are known."""
    if pictures.labels is None:
        return list(range(min(_PICTURES, len(pictures)))), ()
    return first_of_classes(pictures.labels, pictures.classes)


def _warnings(sets: Sequence[_Set]) -> dict[str, str]:
    """What a reader of the Inception Score must know."""
    notes = {}
    for one in sets:
        count, labels = len(one.pictures), one.pictures.labels
        if count > generation.SCORE_BLOCK and labels is not None and bool(np.all(np.diff(labels) >= 0)):
            notes[f"warning: {one.name}"] = (
                "the samples lie in the order of their classes: each block of the Inception Score holds few of them, "
                "and the score is too low"
            )
        elif count > generation.SCORE_BLOCK and count % generation.SCORE_BLOCK:
            notes[f"note: {one.name}"] = (
                f"the last block of the Inception Score has only {count % generation.SCORE_BLOCK:,} samples"
            )
    for name, note in notes.items():
        sys.stderr.write(f"fvq_jax: {name}: {note}\n")
    return notes


def _drawing(args: argparse.Namespace, pictures: StoredPictures) -> dict[str, Any]:
    """How samples were drawn."""
    assert isinstance(pictures, DrawnPictures)
    names = ("seed", "temperature", "top_k", "top_p", "schedule", "rounding")
    facts = {name: getattr(args, name) for name in names}
    classes = pictures.generator.net.classes
    facts |= {"condition": pictures.options["condition"], "labels": f"image i is of class i modulo {classes}"}
    return {"drawn_by": repr(pictures.generator), **facts}


def _figures(one: SampleSet, reference: Reference) -> dict[str, Any]:
    guidance = {} if one.guidance is None else {"guidance": one.guidance}
    few = biased(one.metrics, one.images)
    return {**guidance, **one.metrics, "samples": one.images, "reference_images": reference.images, "biased": few}


def _title(args: argparse.Namespace, sets: Sequence[_Set]) -> str:
    if args.generator:
        return f"Generator: {args.generator}"
    return f"Samples: {', '.join(one.name for one in sets)}"
