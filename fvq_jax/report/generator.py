"""The report about a generator: what its samples look like, how they score, how it was trained.

`evals` computes what it shows, `generator_figures` draws it, and `page` makes the page around it. It also shows samples
whose generator is not known, such as those of an .npz.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from fvq_jax.evals.frechet import biased
from fvq_jax.evals.metric_table import METRICS
from fvq_jax.report.blocks import details, plots, tile
from fvq_jax.report.figures import Rows
from fvq_jax.report.generator_figures import bits_figure, guidance_figure
from fvq_jax.report.page import NONE, PLUS_MINUS, shell, write_page
from fvq_jax.report.pictures import QUALITY, data_uri, is_lossless
from fvq_jax.report.published import GENERATOR_SOURCES, GENERATORS, PublishedGenerator

_TILES = (
    "nll_bits",
    "unigram_bits",
    "bigram_bits",
    "fid",
    "sfid",
    "inception_score",
    "precision",
    "recall",
    "class_accuracy",
)
_PUBLISHED = ("fid", "sfid", "inception_score", "precision", "recall")
_SCORES = (*_PUBLISHED, "class_accuracy")
_PUBLISHED_SAMPLES = 50_000


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """One set of samples: drawn in one way, scored together.

    Attributes:
      name: what to call it, for instance "guidance 1.75".
      metrics: its scores, by names of `METRICS`.
      images: how many samples were scored; 0 if none were.
      guidance: with which guidance they were drawn, if known.
      pictures: some of them, uint8 [n, H, W, 3].
      captions: the class of each of these in words; () if the classes are not known. Pictures with equal captions stand
        in one row.
    """

    name: str
    metrics: Mapping[str, float]
    images: int
    guidance: float | None = None
    pictures: UInt8[np.ndarray, "n H W 3"] | None = None
    captions: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class GeneratorReport:
    """What the page shows.

    Attributes:
      title: the generator, or the samples, in a few words.
      facts: what was scored and how, for the header and the list of details: name and value, in order. `protocol`,
        `protocol_means` and `reference` say how samples were scored; they may be missing.
      metrics: figures of the generator itself, such as `nll_bits`.
      samples: the sets of samples, in the order in which they are shown.
      not_computed: which scores are missing, and why.
      rows: what training has logged, if anything.
      config: the config of the training run, by full field name; {} if there is none.
    """

    title: str
    facts: Mapping[str, Any]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples: Sequence[SampleSet] = ()
    not_computed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: Rows = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> SampleSet | None:
        """The set of samples with the lowest FID, or else the highest class accuracy, or else the first."""
        return best_of(self.samples)


def best_of(samples: Sequence[SampleSet]) -> SampleSet | None:
    """The set with the lowest FID, or else the highest class accuracy, or else the first; None of none."""
    for name, sign in (("fid", 1), ("class_accuracy", -1)):
        scored = [one for one in samples if np.isfinite(one.metrics.get(name, np.nan))]
        if scored:
            return min(scored, key=lambda one: sign * one.metrics[name])
    return samples[0] if samples else None


def first_of_classes(
    labels: Int[np.ndarray, "n"], names: Sequence[str] = (), *, classes: int = 10, each: int = 8
) -> tuple[list[int], tuple[str, ...]]:
    """Which of many samples a page shows: the positions of the first `each` of some classes, and a caption for each.

    If there are more than `classes` classes, these are evenly spaced among them. `names` are those of the
    first classes, or of all.
    """
    present = np.unique(labels)
    rows = min(classes, len(present))
    positions: list[int] = []
    captions: list[str] = []
    for label in present[np.arange(rows) * len(present) // rows]:
        chosen = np.flatnonzero(labels == label)[:each].tolist()
        positions += chosen
        captions += [names[label] if label < len(names) else f"class {label}"] * len(chosen)
    return positions, tuple(captions)


def write_generator_report(folder: str | os.PathLike[str], report: GeneratorReport) -> Path:
    """Writes `folder/report/index.html`; returns its path. InputError if that cannot be written."""
    return write_page(folder, page(report))


def page(report: GeneratorReport) -> str:
    """The page as text; the same for the same report."""
    parts = (_header(report), _samples(report), _guidance(report), _comparison(report), _training(report))
    return shell(report.title, "\n".join([*(part for part in parts if part), _details(report)]))


def _header(report: GeneratorReport) -> str:
    best = report.best
    lead = []
    if best is not None and best.images:
        several = f" in each of {len(report.samples)} sets" if len(report.samples) > 1 else ""
        lead.append(f"<b>{best.images:,}</b> samples{several}")
    lead += [
        f"{name} <b>{escape(str(report.facts[name]))}</b>"
        for name in ("data", "reference", "protocol")
        if report.facts.get(name)
    ]
    if best is not None and len(report.samples) > 1:
        lead.append(f"scores below: <b>{escape(best.name)}</b>, the best of all")
    shown = {**report.metrics, **(best.metrics if best else {})}
    tiles = "".join(tile(name, shown[name], _note(name, shown, best)) for name in _TILES if name in shown)
    return f'<h1>{escape(report.title)}</h1>\n<p class="lead">{" · ".join(lead)}</p>\n<div class="tiles">{tiles}</div>'


def _note(name: str, shown: Mapping[str, float], best: SampleSet | None) -> str:
    """What stands below a figure at the top."""
    if best is not None and biased([name], best.images):
        return "biased upwards"
    if name == "inception_score":
        return f"{PLUS_MINUS} {METRICS['inception_score_std'].text(shown.get('inception_score_std'), NONE)}"
    if name == "class_accuracy" and "class_accuracy_of_real" in shown:
        return f"real crops: {METRICS[name].text(shown['class_accuracy_of_real'])}"
    return ""


def _samples(report: GeneratorReport) -> str:
    drawn = [one for one in report.samples if one.pictures is not None and len(one.pictures)]
    if not drawn:
        return ""
    best = best_of(drawn)
    first = drawn[0].pictures
    storage = "" if first is None or is_lossless(first[0]) else f" Shown as WebP of quality {QUALITY}."
    rows = "A row for every class. " if best is not None and best.captions else ""
    parts = [f'<h2>Samples</h2>\n<p class="note">{rows}Not chosen by hand: the first of each class.{storage}</p>']
    if len(drawn) == 1:
        return "\n".join([*parts, _grid(drawn[0], "classes card")])
    for one in drawn:
        state = " open" if one is best else ""
        scores = ", ".join(
            f"{METRICS[name].heading} {METRICS[name].text(one.metrics[name])}"
            for name in ("fid", "class_accuracy")
            if name in one.metrics
        )
        title = f"{one.name}: {scores}" if scores else one.name
        parts.append(
            f'<details class="card"{state}><summary>{escape(title)}</summary>{_grid(one, "classes")}</details>'
        )
    return "\n".join(parts)


def _grid(samples: SampleSet, kind: str) -> str:
    """Pictures, a row for each caption in the order in which captions first appear."""
    pictures = samples.pictures
    assert pictures is not None
    rows: dict[str, list[str]] = {}
    for index, picture in enumerate(pictures):
        caption = samples.captions[index] if samples.captions else ""
        what = f"sample of {caption}" if caption else f"sample {index}"
        rows.setdefault(caption, []).append(f'<img src="{data_uri(picture)}" alt="{escape(what)}">')
    small = " small" if is_lossless(pictures[0]) else ""
    columns = max(map(len, rows.values())) if samples.captions else 8
    lines = "".join(
        f'<div class="row" style="--columns: {columns}"><span>{escape(caption)}</span><div>{"".join(row)}</div></div>'
        for caption, row in rows.items()
    )
    return f'<div class="{kind}{small}">{lines}</div>'


def _guidance(report: GeneratorReport) -> str:
    known = [(one.guidance, one.metrics) for one in report.samples if one.guidance is not None]
    figure = guidance_figure([guidance for guidance, _ in known], [metrics for _, metrics in known])
    if figure is None:
        return ""
    caption = (
        "Every score of samples drawn with more and more guidance; a ring marks the best. Guidance makes samples look "
        "more like their class and less different from each other."
    )
    if any("fid" in metrics for _, metrics in known):
        caption += " So precision and the Inception Score rise, recall falls, and FID is lowest in between."
    return f"<h2>Guidance</h2>\n{plots([('Scores over guidance', figure, caption)])}"


def _comparison(report: GeneratorReport) -> str:
    scored = [one for one in report.samples if any(name in one.metrics for name in _PUBLISHED)]
    if not scored:
        return ""
    own = [name for name in _SCORES if name != "class_accuracy" or any(name in one.metrics for one in scored)]
    headings = ("Samples", "Size", *(METRICS[name].heading for name in own))
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    size = escape(str(report.facts.get("size", NONE)))
    lines = [_row([escape(one.name), size, *(_score(name, one.metrics) for name in own)], "own") for one in scored]
    for source, means in GENERATOR_SOURCES.items():
        text = f"<b>{escape(source)}.</b> ImageNet, {_PUBLISHED_SAMPLES:,} samples. {escape(means)}"
        lines.append(f'<tr class="source"><td colspan="{len(headings)}">{text}</td></tr>')
        for result in GENERATORS:
            if result.source == source:
                name = f"{result.name}, {result.parameters:,} M"
                lines.append(_row([name, str(result.size), *(_published(score, result) for score in own)]))
    warning = ""
    fewest = min(one.images for one in scored)
    if any("fid" in one.metrics for one in scored) and fewest < _PUBLISHED_SAMPLES:
        warning = (
            f" <b>FID of {fewest:,} samples:</b> the Frechet distance is biased upwards for few samples and cannot be "
            f"compared with that of {_PUBLISHED_SAMPLES:,}."
        )
    means = escape(str(report.facts.get("protocol_means", "the classes of samples")))
    reference = escape(str(report.facts.get("reference", NONE)))
    return (
        "<h2>Beside reported results</h2>\n"
        '<p class="note">Figures compare only between equal data, sizes, references and protocols: these samples were '
        f"scored against {reference}, {means}.{warning} {NONE}: not computed or not reported.</p>\n"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _score(name: str, values: Mapping[str, float]) -> str:
    text = METRICS[name].text(values.get(name), NONE)
    deviation = values.get(f"{name}_std")
    return text if deviation is None else f"{text} {PLUS_MINUS} {METRICS[f'{name}_std'].text(deviation)}"


def _published(name: str, result: PublishedGenerator) -> str:
    """A reported score; precision and recall were reported to two digits."""
    value = getattr(result, name, None)
    return f"{value:.2f}" if value is not None and name in ("precision", "recall") else METRICS[name].text(value, NONE)


def _row(cells: Sequence[str], kind: str = "") -> str:
    return f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _training(report: GeneratorReport) -> str:
    figure = bits_figure(report.rows)
    if figure is None:
        return ""
    caption = (
        "Bits that the generator needs for a code, given its class and the codes before it. Unigram: what knowing how "
        "often every code occurs would need; bigram: what knowing the code before as well would need. A generator that "
        "is not clearly below the bigram has learned no more than which codes are neighbours. Held-out bits that rise "
        "while those of training fall mean overfitting."
    )
    return f"<h2>Training</h2>\n{plots([('Bits per code', figure, caption)])}"


def _details(report: GeneratorReport) -> str:
    metrics = {name: f"{value:,.6g}" for name, value in report.metrics.items()}
    for one in report.samples:
        metrics |= {f"{one.name}: {name}": f"{value:,.6g}" for name, value in one.metrics.items()}
    return details(
        {
            "What was scored, and how": report.facts,
            "Every metric": metrics,
            "Not computed": report.not_computed,
            "Config of the run": report.config,
        }
    )
