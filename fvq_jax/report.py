"""Pictures of a run for a person to look at: `workdir/report/*.png`.

Drawn with matplotlib's object-oriented interface (no pyplot, so no global figures and no display). The rows
are those of `fvq_jax.metrics.read_metrics`; whatever they lack is left out of the pictures. Reconstructing
and counting are left to the evaluation.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64, Int, Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from fvq_jax.ops import code_statistics

Rows = Sequence[Mapping[str, Any]]
Pictures = UInt8[np.ndarray, "n H W 3"]
Counts = Int[np.ndarray | jax.Array, "k"]

_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#666666"
_SMALLEST_SIDE = 128  # pixels; smaller pictures are enlarged
_PAIR_GAP, _COLUMN_GAP, _ROW_GAP = 2, 6, 14
_DPI = 110


def write_report(
    workdir: str | os.PathLike[str],
    rows: Rows,
    eval_counts: Counts | None,
    originals: Pictures | None,
    reconstructions: Pictures | None,
    *,
    batch_tokens: int | None = None,
    window_tokens: int | None = None,
) -> list[Path]:
    """Write what the arguments allow of the four pictures to `workdir/report/`; returns the paths written.

    `losses.png` and `usage.png` follow from `rows` (at least one with such a scalar), `code_frequencies.png`
    from the code histogram of the evaluation, `reconstructions.png` from the picture pairs. `batch_tokens`
    and `window_tokens` are the sizes of the windows behind `usage/batch` and `usage/window`, to be named in
    the legend.
    """
    figures: dict[str, Figure | None] = {
        "losses": loss_figure(rows),
        "usage": usage_figure(rows, eval_counts, batch_tokens=batch_tokens, window_tokens=window_tokens),
    }
    if eval_counts is not None:
        figures["code_frequencies"] = code_frequency_figure(eval_counts)
    if originals is not None and reconstructions is not None and len(originals):
        figures["reconstructions"] = reconstruction_figure(originals, reconstructions)

    folder = Path(workdir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written


def to_pixels(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """A figure as the picture that `savefig` would write, for instance for TensorBoard."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def reconstruction_grid(
    originals: Pictures, reconstructions: Pictures, *, columns: int = 8
) -> UInt8[np.ndarray, "height width 3"]:
    """Every original with its reconstruction directly below it, pairs side by side, `columns` to a row, on white.

    Pictures with a side below 128 pixels are enlarged by a whole factor, each pixel repeated. ValueError
    without pictures or if the shapes differ.
    """
    if originals.shape != reconstructions.shape or len(originals) == 0:
        raise ValueError(f"need as many reconstructions as originals: {reconstructions.shape}, {originals.shape}")
    scale = _enlargement(originals)
    pairs = np.stack([originals, reconstructions], axis=1).repeat(scale, axis=2).repeat(scale, axis=3)
    count, _, height, width, _ = pairs.shape
    columns = min(columns, count)
    pair_rows = math.ceil(count / columns)
    pair_height = 2 * height + _PAIR_GAP
    grid = np.full(
        (
            pair_rows * (pair_height + _ROW_GAP) - _ROW_GAP,
            columns * (width + _COLUMN_GAP) - _COLUMN_GAP,
            3,
        ),
        255,
        np.uint8,
    )
    for index, (original, reconstruction) in enumerate(pairs):
        top = index // columns * (pair_height + _ROW_GAP)
        left = index % columns * (width + _COLUMN_GAP)
        below = top + height + _PAIR_GAP
        grid[top : top + height, left : left + width] = original
        grid[below : below + height, left : left + width] = reconstruction
    return grid


def _enlargement(pictures: Pictures) -> int:
    return math.ceil(_SMALLEST_SIDE / min(pictures.shape[1:3]))


def reconstruction_figure(originals: Pictures, reconstructions: Pictures) -> Figure:
    """The grid with a caption and its rows named, every pixel of it unchanged."""
    grid = reconstruction_grid(originals, reconstructions)
    height, width = originals.shape[1:3]
    scale = _enlargement(originals)
    caption = f"evaluation images, {width} x {height} pixels"
    if scale > 1:
        caption += f", enlarged {scale}x"

    left, right, top, bottom = 34, 14, 40, 14
    total_width, total_height = max(grid.shape[1] + left + right, 420), grid.shape[0] + top + bottom
    figure = Figure(figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI, facecolor="white")
    figure.figimage(grid, xo=left, yo=bottom, origin="upper")
    figure.text(left / total_width, 1 - top / 2 / total_height, caption, va="center", fontsize=11)
    cell = height * scale
    for row_top in range(0, grid.shape[0], 2 * cell + _PAIR_GAP + _ROW_GAP):
        for name, middle in (("original", cell / 2), ("reconstruction", cell * 1.5 + _PAIR_GAP)):
            y = 1 - (top + row_top + middle) / total_height
            figure.text(left / 2 / total_width, y, name, rotation=90, ha="center", va="center", fontsize=9)
    return figure


def usage_figure(
    rows: Rows,
    eval_counts: Counts | None = None,
    *,
    batch_tokens: int | None = None,
    window_tokens: int | None = None,
) -> Figure | None:
    """Usage over steps, one curve per named window (batch, training window, evaluation); None without a value.

    Where a window's size is known, the legend says what perfectly uniform use of the codes would show in it.
    """
    eval_tokens = None if eval_counts is None else int(np.sum(eval_counts))
    codebook_size = None if eval_counts is None else len(eval_counts)
    curves = (
        ("usage/batch", "batch (one step)", batch_tokens, {"color": _GREY, "linewidth": 1.0, "alpha": 0.7}),
        ("usage/window", "window (last training steps)", window_tokens, {"color": _BLUE, "linewidth": 1.8}),
        ("eval/usage", "eval (held-out images)", eval_tokens, {"color": _ORANGE, "linewidth": 1.2, "marker": "o"}),
    )
    figure = Figure(figsize=(8.0, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for name, label, tokens, style in curves:
        steps, values = _series(rows, name)
        if steps.size == 0:
            continue
        if tokens:
            label += f", {tokens:,} tokens"
            if codebook_size:
                label += f" (uniform use: {_uniform_usage(tokens, codebook_size):.1%})"
        axes.plot(steps, values, label=label, **_with_markers(style, steps.size))
    if not axes.lines:
        return None
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_ylabel("codes hit at least once in the window")
    _style(axes)
    _step_axis(axes)
    title = "Codebook usage" if codebook_size is None else f"Codebook usage, {codebook_size:,} codes"
    axes.set_title(title, loc="left", fontsize=12)
    figure.legend(loc="outside lower center", ncols=1, fontsize=9, frameon=False)
    return figure


def _uniform_usage(tokens: int, codebook_size: int) -> float:
    """The usage expected of `tokens` independent, uniformly drawn codes: 1 - (1 - 1/k)^n."""
    if codebook_size == 1:
        return 1.0
    return -math.expm1(tokens * math.log1p(-1.0 / codebook_size))


def code_frequency_figure(eval_counts: Counts) -> Figure:
    """Share of the evaluation's tokens that each code takes, most frequent code first, against uniform use."""
    counts = np.sort(np.asarray(eval_counts, dtype=np.int64))[::-1]
    codebook_size, tokens = counts.size, int(counts.sum())
    hit = int(np.count_nonzero(counts))
    usage = float(code_statistics.usage(np.asarray(eval_counts)))
    perplexity = float(code_statistics.perplexity(np.asarray(eval_counts)))

    figure = Figure(figsize=(8.0, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    uniform = 1.0 / codebook_size
    axes.axhline(uniform, color=_ORANGE, linestyle="--", linewidth=1.2, label=f"uniform use, 1/{codebook_size:,}")
    if hit:
        share = counts[:hit] / tokens
        edges = np.arange(hit + 1) + 0.5
        axes.stairs(share, edges, color=_BLUE, linewidth=1.6, label="measured")
        lowest, highest = min(share[-1], uniform) / 2.0, max(share[0], uniform) * 2.0
        axes.set_ylim(lowest, highest)
        if highest < 100.0 * lowest:
            _log_axis(axes)
    if hit < codebook_size:
        axes.axvspan(
            hit + 0.5,
            codebook_size + 0.5,
            color=_GREY,
            alpha=0.15,
            linewidth=0,
            label=f"codes never used: {codebook_size - hit:,}",
        )
    axes.set_xlim(0.5, codebook_size + 0.5)
    axes.set_xlabel("rank of the code (1 = most frequent)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_ylabel("share of all tokens")
    _style(axes)
    axes.legend(loc="best", fontsize=9, frameon=False)
    axes.set_title(
        f"Evaluation window of {tokens:,} tokens: usage {usage:.1%} ({hit:,} of {codebook_size:,} codes), "
        f"perplexity {perplexity:,.1f}",
        loc="left",
        fontsize=11,
    )
    return figure


def loss_figure(rows: Rows) -> Figure | None:
    """One panel per loss term (`loss/...`) over steps, logarithmic where its values allow; None without a value."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("loss/"))
    series = {name: _series(rows, name) for name in sorted(names, key=lambda name: name != "loss/total")}
    series = {name: points for name, points in series.items() if points[0].size}
    if not series:
        return None
    columns = min(len(series), 3)
    panel_rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(max(4.0 * columns, 5.0), 2.9 * panel_rows + 0.4), dpi=_DPI, layout="constrained")
    panels = figure.subplots(panel_rows, columns, squeeze=False).flatten()
    for axes, (name, (steps, values)) in zip(panels, series.items(), strict=False):
        smoothed = _running_mean(values)
        if smoothed is None:
            axes.plot(steps, values, color=_BLUE, **_with_markers({"linewidth": 1.6}, steps.size))
        else:
            axes.plot(steps, values, color=_BLUE, linewidth=0.8, alpha=0.35)
            axes.plot(steps, smoothed, color=_BLUE, linewidth=1.8)
        logarithmic = values.min() > 0.0 and values.max() >= 3.0 * values.min()
        if logarithmic:
            _log_axis(axes)
        axes.set_title(name.removeprefix("loss/") + (" (log scale)" if logarithmic else ""), loc="left", fontsize=11)
        _style(axes)
        _step_axis(axes)
    for axes in panels[len(series) :]:
        axes.remove()
    smoothing = " (bold: running mean)" if any(len(axes.lines) > 1 for axes in figure.axes) else ""
    figure.suptitle(f"Training losses{smoothing}", x=0.01, ha="left", fontsize=12)
    return figure


def _series(rows: Rows, name: str) -> tuple[Int64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
    """Steps (ascending, each once: the later row counts) and finite values of a scalar; others are left out."""
    points = {int(row["step"]): float(row[name]) for row in rows if row.get(name) is not None}
    steps = sorted(step for step, value in points.items() if math.isfinite(value))
    return np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64)


def _running_mean(values: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"] | None:
    """Centred mean over about 5 % of the points, fewer at both ends; None where there are too few points."""
    if values.size < 40:
        return None
    half = values.size // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    return (sums[last] - sums[first]) / (last - first)


def _with_markers(style: Mapping[str, Any], points: int) -> dict[str, Any]:
    """Lines of few points get markers, so that a single one is visible."""
    return {**({"marker": "o"} if points <= 12 else {}), "markersize": 4, **style}


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _style(axes: Axes) -> None:
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
