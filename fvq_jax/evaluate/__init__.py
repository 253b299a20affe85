"""Command line: scores reconstructions or samples, by a protocol that is named beside every figure.

A trained tokenizer on a set of pictures:

  python -m fvq_jax.evaluate --workdir=DIR --out=OUT [--data=FOLDER] [--protocol=direct|published]
  python -m fvq_jax.evaluate --tokenizer=PATH --data=photos --out=OUT --size=256 --inception=FILE

  python -m fvq_jax.evaluate --workdir=DIR --compare=DIR2,FILE --out=OUT

Generated pictures beside real ones, as ADM's evaluation suite scores them (see `samples`):

  python -m fvq_jax.evaluate --samples=A.npz[,B.npz,FOLDER] --reference=R.npz|FOLDER|photos --inception=FILE --out=OUT
  python -m fvq_jax.evaluate --generator=PATH --tokenizer=PATH --guidance=1,1.5,2 --count=50000 --reference=...
      --inception=FILE --out=OUT

Writes OUT/metrics.json, whose content is also the last line on standard output, and OUT/report/index.html, a page for a
person. Without --data the pictures of a tokenizer are those that the run in the workdir is evaluated on. Metrics that
use a trained network need its weights as a local file. Of a tokenizer's metrics, one without its file is listed under
`not_computed`, with what to get; samples cannot be scored without InceptionV3. With `--distributed` it is one of
several processes, and only the first one writes. Exit codes: 0, 2 for bad input, and 1 if no pictures come for
`data.timeout` seconds (as in the config of the workdir, or else the default).
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.npz_rows import ImageWriter
from fvq_jax.data.photos import PhotoSource
from fvq_jax.data.record import Source
from fvq_jax.data.sources import kind_of, make_source
from fvq_jax.evals.frechet import biased
from fvq_jax.evals.networks import FILES, Networks, load_networks
from fvq_jax.evals.projection import principal_plane
from fvq_jax.evals.reconstruction import Found, Reconstructed, collect, conditions, not_computed, summarise
from fvq_jax.evals.reference import Moments, Reference
from fvq_jax.evaluate.options import NPZ, SIZE, parse
from fvq_jax.evaluate.samples import evaluate_samples
from fvq_jax.inference.class_tables import condition_of, labels_for
from fvq_jax.inference.tokenizer import Tokenizer, describe
from fvq_jax.models.quantizers import Quantizer, make_quantizer
from fvq_jax.ops.code_usage import usage_by_position
from fvq_jax.report.tokenizer import Compared, Report, Trained, write_report
from fvq_jax.runtime import exits
from fvq_jax.runtime.agreement import check_same, everywhere
from fvq_jax.runtime.arguments import place
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import json_text, make_folder, write_whole
from fvq_jax.runtime.hosts import rows_of_all_hosts
from fvq_jax.runtime.names import dotted
from fvq_jax.runtime.storage import CONFIG, split_step
from fvq_jax.tasks import default_config
from fvq_jax.tasks.tokenizer.fields import QUANTIZER, upgraded, use_quantizer
from fvq_jax.tasks.tokenizer.pictures import data_name, source_of
from fvq_jax.training.metric_files import read_metrics

METRICS = "metrics.json"


def main(argv: list[str] | None = None) -> int:
    """Evaluates; returns the exit code."""
    args = parse(argv)
    where = place(args)
    return exits.run(lambda: _evaluate(args), where.join if where else None, kept="no figures were written")


def _evaluate(args: argparse.Namespace) -> int:
    report = evaluate(args) if args.samples is None and args.generator is None else evaluate_samples(args)
    if jax.process_index() == 0:
        sys.stdout.write(json_text(report) + "\n")
        sys.stdout.flush()
    return 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Writes `metrics.json` and the page. Returns the content of the first; {} in all processes but the first.

    Raises:
      InputError: for bad input.
      DataError: the pictures stop coming; RunError if they do on another host.
    """
    prepared = everywhere(lambda: _prepare(args))
    path, trained, tokenizer = prepared.path, prepared.trained, prepared.tokenizer
    networks, source, images, size = prepared.networks, prepared.source, prepared.images, prepared.size
    check_same({"pictures": source.fingerprint()})
    first = jax.process_index() == 0
    for metric, reason in networks.not_computed.items() if first else ():  # now, and not after hours
        sys.stderr.write(f"fvq_jax: not computed: {metric}: {reason}\n")
    reference, known = None, None
    if networks.inception is not None:
        what = {"protocol": args.protocol, "size": size, "images": images, "weights": args.inception}
        reference = Reference.of(args.reference_cache, source, **what)
        known = reference.load() if first else None

    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ImageWriter(args.out / NPZ, size, size, active=first)) if args.save_npz else None
        found = _pass(args, prepared, prepared, known=known, writer=writer)
    others = [_pass(args, prepared, other, known=known) for other in prepared.compared]
    if not first:
        return {}
    quantizer = _quantizer(trained, tokenizer)
    positions = quantizer.positions()
    sums, moments = found.sums, known
    if sums.real is not None and sums.images >= 2:
        moments = sums.real.moments()
        if reference and not sums.skipped:  # what cannot be read now may be readable the next time
            reference.save(moments)
    facts: dict[str, str | int] = {"tokenizer": describe(quantizer, tokenizer.downsampling), "path": str(path)}
    facts |= conditions(found, source, data=prepared.data, protocol=args.protocol, size=size)
    facts["condition"] = prepared.condition
    table = tokenizer.table("null" if tokenizer.classes else None)
    report = Report(
        tokenizer=Trained.of(quantizer, tokenizer.downsampling),
        facts=facts,
        metrics=summarise(sums, size**2, quantizer.choices, moments, quantizer.level_names, positions),
        not_computed=not_computed(networks, sums),
        found=found,
        plane=None if table is None else jax.device_get(jax.jit(principal_plane)(table)),
        rows=read_metrics(split_step(path)[0]) if trained else (),
        batch_tokens=_tokens(trained, tokenizer) if trained else None,
        config=dotted(trained) if trained else {},
        compared=[
            Compared(
                str(other.path),
                Trained.of(_quantizer(other.trained, other.tokenizer), other.tokenizer.downsampling),
                summarise(seen.sums, size**2, kind.choices, moments, kind.level_names),
                seen.examples.spread,
            )
            for other, seen in zip(prepared.compared, others, strict=True)
            for kind in [other.tokenizer.trained_net.quantizer]
        ],
    )
    metrics = {
        **facts,
        **report.metrics,
        "reference": {"path": str(reference.path), "cached": known is not None} if reference and moments else None,
        "usage_by_position": usage_by_position(sums.code_counts.sum(axis=0), positions).tolist(),
        "not_computed": report.not_computed,
        "biased": biased(report.metrics, report.facts["different_pictures"]),
        "compared": [{"path": other.name, **other.metrics} for other in report.compared],
    }
    write_whole(args.out / METRICS, json_text(metrics, indent=2) + "\n")  # first: the page only shows it
    write_report(args.out, report)
    return metrics


def _pass(
    args: argparse.Namespace,
    prepared: "_Prepared",
    scored: "_Prepared | _Other",
    *,
    known: Moments | None,
    writer: ImageWriter | None = None,
) -> Found:
    """Reconstructs and scores all pictures with one of the tokenizers; `known`: statistics of the real pictures."""
    tokenizer, size, source = scored.tokenizer, prepared.size, prepared.source
    quantizer, grid = tokenizer.trained_net.quantizer, (size // tokenizer.downsampling,) * 2
    first, data = jax.process_index() == 0, (prepared.trained or default_config()).data

    def reconstruct(crops: np.ndarray, labels: np.ndarray) -> Reconstructed:
        found = tokenizer.reconstruct(crops, labels_for(scored.condition, labels))
        if not np.isfinite(found.images).all():
            raise InputError(f"the reconstructions of {tokenizer} are not finite: its weights are broken")
        return Reconstructed(*found)

    total = min(prepared.images or len(source), len(source))
    with tqdm(total=total, unit=" images", desc=f"evaluating ({args.protocol})", disable=not first) as bar:
        return collect(
            reconstruct,
            source,
            prepared.networks,
            codebook_size=quantizer.size,
            level_of=quantizer.level_of(*grid),
            size=size,
            batch_size=args.batch,
            protocol=args.protocol,
            images=prepared.images,
            timeout=data.timeout,
            max_unreadable=data.max_unreadable,
            with_reference=scored is prepared and not _of_first_process(known is not None),
            writer=writer,
            progress=bar.update,
        )


def _quantizer(trained: ConfigDict | None, tokenizer: Tokenizer) -> Quantizer:
    """The quantizer as it was trained: of one with state only the table is loaded, which knows no bridge and groups."""
    return make_quantizer(trained.tokenizer.quantizer.to_dict()) if trained else tokenizer.trained_net.quantizer


def _tokens(trained: ConfigDict, tokenizer: Tokenizer) -> int:
    """Codes of a training batch."""
    side = trained.data.image_size // tokenizer.downsampling
    return trained.batch_size * math.prod(tokenizer.trained_net.quantizer.code_shape(side, side))


@dataclasses.dataclass(frozen=True)
class _Other:
    """A tokenizer that is scored beside the first one; the attributes are as in `_Prepared`."""

    path: Path
    trained: ConfigDict | None
    tokenizer: Tokenizer
    condition: str


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """All that is needed before the first picture is scored.

    Attributes:
      path: where the tokenizer is.
      trained: the config of the run that made it, if `path` is a workdir.
      source, data: the pictures, and what to call them.
      images: how many of them to score; 0 for all.
      size: side of the crops.
      condition: what a bridge with classes is given, see `condition_of`.
      compared: further tokenizers.
    """

    path: Path
    trained: ConfigDict | None
    tokenizer: Tokenizer
    networks: Networks
    source: Source
    data: str
    images: int
    size: int
    condition: str
    compared: Sequence[_Other]


def _prepare(args: argparse.Namespace) -> _Prepared:
    """Checks the options and loads what they name; InputError for whatever cannot work."""
    if args.batch < 1 or min(args.images, args.crops, args.seed) < 0:
        raise InputError("--batch must be at least 1, and --images, --crops and --seed at least 0")
    if args.size is not None and args.size < 1:
        raise InputError(f"--size must be at least 1, the side of the crops in pixels, not {args.size}")
    if args.images and args.crops:
        raise InputError("--images and --crops exclude each other: both say how many to score")
    make_folder(args.out)  # before hours of work, not after
    path = args.workdir or args.tokenizer
    trained = _config_of_run(path)
    size = args.size or (trained.data.image_size if trained else SIZE)
    paths = (path, *args.compare)
    loaded = [_load(other, size, args.l2_norm) for other in paths]
    with_classes = any(tokenizer.classes for tokenizer in loaded)
    first, *compared = [
        _Other(
            other,
            _config_of_run(other),
            tokenizer,
            # Of several tokenizers, those without classes do not mind a condition that another one needs.
            condition_of(tokenizer.classes, args.condition if tokenizer.classes or not with_classes else None),
        )
        for other, tokenizer in zip(paths, loaded, strict=True)
    ]
    images = args.images or (trained.eval.images if trained and args.data is None else 0)
    source, data = _source(args.data, size, images, copy.deepcopy(trained))
    crops = args.crops
    if trained and args.data is None and not args.images and size == trained.data.image_size:
        crops = crops or trained.eval.crops
    if args.seed and not crops:
        raise InputError("--seed is that of random crops: leave it out, or add --crops=N")
    if crops:
        if isinstance(source, PhotoSource):
            raise InputError("--crops does not go with the bundled photographs, which are random crops: use --images")
        low, high = (trained.data.resize_min, trained.data.resize_max) if trained else (0, 0)
        source, images = RandomCrops(source, crops, size, low, high, seed=args.seed), 0
    networks = load_networks({name: getattr(args, name) for name in FILES}, size)
    return _Prepared(path, trained, first.tokenizer, networks, source, data, images, size, first.condition, compared)


def _load(path: Path, size: int, l2_norm: bool | None) -> Tokenizer:
    """The tokenizer at a path. InputError if it is none, or does not take pictures of this size."""
    tokenizer = Tokenizer.from_pretrained(path, l2_norm=l2_norm)
    try:
        tokenizer.code_shape(size, size)
    except InputError as error:
        raise InputError(f"--size {size}: {path}: {error}") from None
    return tokenizer


def _source(given: str | None, size: int, images: int, trained: ConfigDict | None) -> tuple[Source, str]:
    """The pictures, whole, and what to call them."""
    if given is not None:
        return make_source(kind_of(given), "eval", image_size=size, eval_dir=given, eval_images=images), given
    if trained is None:
        raise InputError("--data=FOLDER is missing: only the workdir of a run says what that is evaluated on")
    trained.data.image_size, trained.eval.images, trained.eval.crops = size, images, 0
    return source_of(trained, "eval"), data_name(trained)


def _config_of_run(path: Path) -> ConfigDict | None:
    """The config of the run in a workdir; None for any other path (a wrong one is noticed on loading)."""
    path, _ = split_step(path)
    try:
        saved = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(saved, dict) or "data" not in saved:
        return None
    if saved.get("task", "tokenizer") != "tokenizer":
        raise InputError(
            f"{path} is the workdir of a {saved['task']}, not of a tokenizer: score its samples with "
            f"--generator={path} --tokenizer=PATH --reference=PATH"
        )
    try:
        config = default_config()
        flat = upgraded(saved)
        use_quantizer(config, flat[f"{QUANTIZER}.name"])
        config.update_from_flattened_dict(flat)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / CONFIG} is not the config of a run of this version: {error}") from error
    return config


def _of_first_process(flag: bool) -> bool:
    """The `flag` of the first process, in every process."""
    return bool(rows_of_all_hosts(np.array([flag]))[0])
