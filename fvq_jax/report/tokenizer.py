"""The report about a tokenizer: how well it reconstructs, how it uses its codes, how it was trained.

`evals` computes what it shows, `figures` draws it, and `page` makes the page around it.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fvq_jax.evals.examples import Example
from fvq_jax.evals.frechet import UNBIASED_FROM
from fvq_jax.evals.metric_table import METRICS
from fvq_jax.evals.reconstruction import Found
from fvq_jax.ops.code_usage import usage_by_position, usage_if_uniform
from fvq_jax.report import figures
from fvq_jax.report.blocks import details, plots, tile
from fvq_jax.report.page import NONE, PLUS_MINUS, TIMES, shell, write_page
from fvq_jax.report.pictures import QUALITY, data_uri, is_lossless
from fvq_jax.report.published import RESULTS, SOURCES, Published

_CONDITIONS = ("size", "protocol", "protocol_means", "data")
_LPIPS = ("lpips_vgg", "lpips_alex")
_NEARLY_ALL = 0.999
_SIDE_BY_SIDE_PICTURES = 8  # of each tokenizer
_SIDE_BY_SIDE = (
    *("usage", "perplexity", "quantization_error", "relative_quantization_error", "psnr", "ssim", *_LPIPS, "rfid"),
    "bits_per_pixel",
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What was trained.

    Attributes:
      codes, code_dim: number and dimension of the codes.
      downsampling: pixels per latent along a side.
      description: in words.
      levels: names of the levels or scales, if there are several.
      positions: the position of every code in its group [k], if codes are grouped.
      choices: from how many codes a level chooses, if not from all.
    """

    codes: int
    code_dim: int
    downsampling: int
    description: str
    levels: tuple[str, ...] = ()
    positions: np.ndarray | None = None
    choices: int | None = None

    @classmethod
    def of(cls, quantizer: Any, downsampling: int) -> "Trained":
        """A tokenizer with this quantizer, see `models/quantizers/base.py`, which this room does not import."""
        return cls(
            quantizer.size,
            quantizer.latent_dim,
            downsampling,
            quantizer.description,
            quantizer.level_names,
            quantizer.positions(),
            quantizer.choices,
        )

    @property
    def title(self) -> str:
        """All of it in one line."""
        codes = f"{self.codes:,} {TIMES} {self.code_dim} codes"
        return f"{codes}, {self.description}, {self.downsampling}{TIMES} down-sampling"


@dataclasses.dataclass(frozen=True)
class Compared:
    """Another tokenizer, scored on the same pictures: its name, what it is, metrics, and examples spread alike."""

    name: str
    tokenizer: Trained
    metrics: Mapping[str, float | int]
    spread: Sequence[Example]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the page shows.

    Attributes:
      tokenizer: what was trained.
      facts: how it was scored, for the header and the list of details: name and value, in order.
      metrics, not_computed: as `evals.reconstruction` gives them.
      found: the pass over the pictures.
      plane: the codes on two axes [k, 2] and the share of the variance along each, see `evals.projection`; None for a
        tokenizer without a table of codes.
      rows: what training has logged, if anything.
      batch_tokens: the size of the window behind `usage/batch`, if known.
      config: the config of the training run, by full field name; {} if there is none.
      compared: further tokenizers to show beside it.
    """

    tokenizer: Trained
    facts: Mapping[str, Any]
    metrics: Mapping[str, float | int]
    not_computed: Mapping[str, str]
    found: Found
    plane: tuple[np.ndarray, np.ndarray] | None
    rows: figures.Rows = ()
    batch_tokens: int | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compared: Sequence[Compared] = ()

    @property
    def title(self) -> str:
        """The tokenizer in one line."""
        return self.tokenizer.title


def write_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Writes `folder/report/index.html`; returns its path. InputError if that cannot be written."""
    return write_page(folder, page(report))


def page(report: Report) -> str:
    """The page as text; the same for the same report."""
    body = "\n".join(
        (
            _header(report),
            _side_by_side(report),
            _reconstructions(report),
            _codes(report),
            _comparison(report),
            _training(report),
            _details(report),
        )
    )
    return shell(f"Tokenizer: {report.title}", body)


def _side_by_side(report: Report) -> str:
    """A table with a row, and a grid with a row of pictures, for every tokenizer; empty if there is only one."""
    if not report.compared:
        return ""
    first = Compared("this one", report.tokenizer, report.metrics, report.found.examples.spread)
    tokenizers = (first, *report.compared)
    labels = _labels([other.name for other in tokenizers])
    shown = [name for name in _SIDE_BY_SIDE if any(name in other.metrics for other in tokenizers)]
    head = "".join(f"<th>{METRICS[name].heading_with_unit}</th>" for name in shown)
    lines = "".join(
        f'<tr class="{"own" if other is first else ""}"><td title="{escape(other.name)}">{escape(label)}'
        f'</td><td class="text">{escape(other.tokenizer.title)}</td>'
        + "".join(f"<td>{METRICS[name].text(other.metrics.get(name), NONE)}</td>" for name in shown)
        + "</tr>"
        for other, label in zip(tokenizers, labels, strict=True)
    )
    pictures = [("original", [example.original for example in first.spread])]
    reconstructed = ([example.reconstruction for example in other.spread] for other in tokenizers)
    pictures += zip(labels, reconstructed, strict=True)
    grid = "".join(
        f'<tr><td class="text">{escape(name)}</td>'
        + "".join(
            f'<td><img src="{data_uri(image)}" alt="{escape(name)}"></td>' for image in row[:_SIDE_BY_SIDE_PICTURES]
        )
        + "</tr>"
        for name, row in pictures
    )
    return (
        "<h2>Side by side</h2>\n"
        '<p class="note">The same pictures, scored in the same way. Usage compares between equal numbers of tokens and '
        "codes only.</p>\n"
        f'<div class="card scroll"><table><thead><tr><th>Tokenizer</th><th class="text">What it is</th>{head}</tr>'
        f"</thead><tbody>{lines}</tbody></table></div>\n"
        f'<div class="card scroll"><table class="side-by-side"><tbody>{grid}</tbody></table></div>'
    )


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of every path, with as many parts before it as tell the paths from each other."""
    parts = [Path(name).parts or (name,) for name in names]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        labels = ["/".join(of[-count:]) for of in parts]
        if len(set(labels)) == len(set(names)):
            break
    return labels


def _header(report: Report) -> str:
    facts = report.facts
    what = "random crops" if facts.get("random_crops") else "pictures"
    lead = (
        f"<b>{facts['images']:,}</b> {what} of <b>{facts['size']} {TIMES} {facts['size']}</b> pixels, "
        f"<b>{facts['tokens']:,}</b> tokens · data <b>{escape(str(facts['data']))}</b> · "
        f"protocol <b>{escape(str(facts['protocol']))}</b>"
        f"{_made_to_fit(facts)}"
    )
    tiles = "".join(tile(name, report.metrics[name], note) for name, note in _tiles(report) if name in report.metrics)
    return f'<h1>Tokenizer: {escape(report.title)}</h1>\n<p class="lead">{lead}</p>\n<div class="tiles">{tiles}</div>'


def _tiles(report: Report) -> Iterable[tuple[str, str]]:
    """(metric, note) of the figures at the top."""
    yield "rfid", "biased upwards" if _few_pictures(report) else ""
    deviation = METRICS["inception_score_std"].text(report.metrics.get("inception_score_std"), NONE)
    yield "inception_score", f"{PLUS_MINUS} {deviation}"
    for metric in ("psnr", "ssim", *_LPIPS):
        yield metric, ""
    even = usage_if_uniform(report.facts["tokens"], report.tokenizer.codes)
    yield "usage", f"even use: {even:.1%}" if even < _NEARLY_ALL else ""
    for metric in ("dead_codes", "perplexity", "relative_quantization_error", "bits_per_pixel"):
        yield metric, ""


def _made_to_fit(facts: Mapping[str, Any]) -> str:
    """How many pictures were too small, if any was."""
    found = [(how, facts.get(f"{how}_pictures", 0)) for how in ("enlarged", "framed")]
    return "".join(f" · <b>{count:,}</b> pictures {how} since they are smaller" for how, count in found if count)


def _few_pictures(report: Report) -> bool:
    return report.facts["different_pictures"] < UNBIASED_FROM


def _comparison(report: Report) -> str:
    head = "".join(
        f"<th{' class=text' if name == 'Protocol' else ''}>{name}</th>"
        for name in (
            "Tokenizer",
            f"Codes {TIMES} dim.",
            "Down.",
            "Epochs",
            *(METRICS[name].name for name in ("usage", "rfid", "psnr", "ssim", "lpips_vgg")),
        )
    )
    lines = [_row("This run", _own_result(report), "own")]
    for source, protocol in SOURCES.items():
        text = f"<b>{escape(source)}.</b> ImageNet validation, 256 {TIMES} 256. {escape(protocol)}"
        lines.append(f'<tr class="source"><td colspan="9">{text}</td></tr>')
        lines += [_row(result.name, result) for result in RESULTS if result.source == source]
    warning = ""
    if "rfid" in report.metrics and _few_pictures(report):
        warning = (
            f" <b>rFID of {report.facts['different_pictures']:,} pictures:</b> the Frechet distance is biased upwards "
            "for few pictures and cannot be compared with that of 50,000."
        )
    size, protocol, means, data = (escape(str(report.facts[name])) for name in _CONDITIONS)
    return (
        "<h2>Beside reported results</h2>\n"
        f'<p class="note">Figures compare only between equal data, sizes and protocols: this run was scored on '
        f"{data}, {size} {TIMES} {size}, protocol {protocol} ({means}).{warning} "
        f"{NONE}: not computed or not reported.</p>\n"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _own_result(report: Report) -> Published:
    metrics = report.metrics
    lpips = next((metric for metric in _LPIPS if metric in metrics), "")
    return Published(
        name="",
        codes=report.tokenizer.codes,
        code_dim=report.tokenizer.code_dim,
        downsampling=report.tokenizer.downsampling,
        epochs=None,
        rfid=metrics.get("rfid"),
        source="",
        usage=metrics.get("usage"),
        psnr=metrics.get("psnr"),
        ssim=metrics.get("ssim"),
        lpips=metrics.get(lpips),
        lpips_network=METRICS[lpips].network if lpips else "",
    )


def _row(name: str, result: Published, kind: str = "") -> str:
    cells = (
        name,
        f"{result.codes:,} {TIMES} {result.code_dim or NONE}",
        f"{result.downsampling}{TIMES}",
        _number(result.epochs, ""),
        _number(result.usage, METRICS["usage"].format if result.usage is None or result.usage >= 0.01 else ".2%"),
        METRICS["rfid"].text(result.rfid, NONE),
        METRICS["psnr"].text(result.psnr, NONE),
        METRICS["ssim"].text(result.ssim, NONE),
        f"{METRICS['lpips_vgg'].text(result.lpips, NONE)} {result.lpips_network}".strip(),
    )
    return f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _reconstructions(report: Report) -> str:
    examples = report.found.examples
    everything = (*examples.spread, *examples.worst, *examples.best)
    if not everything:
        return ""
    storage = "" if is_lossless(everything[0].original) else f" Shown as WebP of quality {QUALITY}, scored before that."
    metric = METRICS[examples.ranked_by]
    ends = ("lowest", "highest") if metric.larger_is_better else ("highest", "lowest")
    return (
        "<h2>Reconstructions</h2>\n"
        f'<p class="note">Drag across a picture, or use the arrow keys: left of the line the original, right of it the '
        f"reconstruction. Spread over the set.{storage}</p>\n"
        f"{_pairs(examples.spread, report)}\n"
        f'<h2>Worst and best</h2>\n<p class="note">The pictures with the {ends[0]} {metric.heading}, worst first.</p>\n'
        f"{_pairs(examples.worst, report)}\n"
        f'<p class="note" style="margin-top:16px">And those with the {ends[1]}, best first.</p>\n'
        f"{_pairs(examples.best, report)}"
    )


def _pairs(examples: Sequence[Example], report: Report) -> str:
    large = "" if all(is_lossless(example.original) for example in examples) else " large"
    pairs = "".join(_pair(example, report.found.examples.ranked_by) for example in examples)
    return f'<div class="pairs{large}">{pairs}</div>'


def _pair(example: Example, ranked_by: str) -> str:
    shown = [name for name in dict.fromkeys((ranked_by, "psnr", "ssim")) if name in example.scores]
    scores = [f"{METRICS[name].heading} {METRICS[name].text(example.scores[name])}" for name in shown]
    lines = [f"<b>{scores[0]}</b>", *(f"<span>{score}</span>" for score in scores[1:])]
    name = escape(os.path.basename(example.name))
    small = " small" if is_lossless(example.original) else ""
    return (
        f'<figure class="pair card{small}"><div class="views">'
        f'<img src="{data_uri(example.reconstruction)}" alt="reconstruction of {name}">'
        f'<img class="original" src="{data_uri(example.original)}" alt="original {name}">'
        f'<input type="range" min="0" max="100" value="50" aria-label="how much of the original {name} to show">'
        f'<span class="ring"></span></div><figcaption title="{escape(example.name)}, picture {example.position:,}">'
        f"{''.join(lines)}<span>{name}</span></figcaption></figure>"
    )


def _codes(report: Report) -> str:
    sums = report.found.sums
    counts, images = sums.code_counts.sum(axis=0), report.found.count
    tokens = report.facts["tokens"] // report.facts["images"]
    shown = [
        (
            "How often each code is chosen",
            figures.code_frequency_figure(counts),
            "A point for each code, sorted; both axes logarithmic. The flatter the line and the closer to the dashed "
            "one, the more evenly the codebook is used; a cliff at the right end means codes that hardly occur. "
            f"The most frequent 1% of the codes take {report.metrics['top_1_percent_share']:.1%} of the tokens.",
        ),
        (
            "Codes used over pictures seen",
            figures.usage_over_images_figure(report.found.first_use, images, tokens),
            "How many of the codes have come up at least once among the first pictures. Dashed: what as many tokens "
            "spread evenly would give. A line that stays below and flattens out means dead codes; one that follows "
            "and still rises at the end means that the set is too small to tell.",
        ),
    ]
    positions = report.tokenizer.positions
    if positions is not None and positions.any():
        shown.append(
            (
                "Codes used by position in the group",
                figures.position_figure(usage_by_position(counts, positions)),
                "The bridge takes codes in groups, and its last layer has weights of its own for every position in a "
                "group. A bar at 0 is a position that training has never reached: none of its codes is chosen. Dashed: "
                f"all codes, {report.metrics['usage']:.1%}.",
            )
        )
    if report.plane is not None:
        points, share = report.plane
        caption = (
            "The table that is searched (bridge applied), on the two directions in which it varies most; colour: how "
            "often a code is chosen. Frequent codes should lie among many others; red clusters are regions "
            "that the encoder never reaches. Codes that look close here may be far apart along other directions."
        )
        caption += figures.DENSITY_MEANS if len(counts) > figures.MOST_POINTS else ""
        shown.append(("Map of the codebook", figures.codebook_map_figure(points, share, counts), caption))
    return f"<h2>Codes</h2>\n{plots(shown)}\n{_levels(report)}"


def _levels(report: Report) -> str:
    """A table with a row for each level or scale; empty if there is only one."""
    names = report.tokenizer.levels
    if not names:
        return ""
    usage, perplexity = METRICS["usage"], METRICS["perplexity"]
    rows = [
        (
            name.replace("_", " "),
            f"{int(own.sum()):,}",
            usage.text(report.metrics[f"usage/{name}"]),
            usage.text(report.metrics[f"usage_most/{name}"]),
            perplexity.text(report.metrics[f"perplexity/{name}"]),
        )
        for name, own in zip(names, report.found.sums.code_counts, strict=True)
    ]
    heads = ("Level", "Tokens", usage.heading, "At most, with so many tokens", perplexity.heading)
    head = "".join(f"<th>{name}</th>" for name in heads)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    own = report.tokenizer.choices or report.tokenizer.codes
    same = own == report.tokenizer.codes
    chooses = "chooses from the same codes" if same else f"has {own:,} codes of its own"
    return (
        f'<p class="note">Each level {chooses}. The figures above count all levels together.</p>\n'
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _training(report: Report) -> str:
    window = max((int(row.get("tokens/window") or 0) for row in report.rows), default=0)
    size = report.tokenizer.codes
    curves = (
        (
            "Losses",
            figures.loss_figure(report.rows),
            "Each term before its weight, over training steps. Where there are many points, the bold line is their "
            "running mean. Adversarial terms need not fall.",
        ),
        (
            "Codes used while training",
            figures.usage_figure(report.rows, size, batch_tokens=report.batch_tokens, window_tokens=window or None),
            "Share of the codes chosen at least once within a window of tokens. Compare a line only with itself, and "
            "with what even use would show in a window of its size.",
        ),
    )
    drawn = [(title, figure, caption) for title, figure, caption in curves if figure is not None]
    return f"<h2>Training</h2>\n{plots(drawn)}" if drawn else ""


def _details(report: Report) -> str:
    return details(
        {
            "How it was scored": report.facts,
            "Every metric": {name: f"{value:,.6g}" for name, value in report.metrics.items()},
            "Not computed": report.not_computed,
            "Config of the run": report.config,
        }
    )


def _number(value: float | int | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"
