"""The figures of a report, as inline SVG whose colours the page chooses for its light or dark theme.

Drawn with matplotlib's object-oriented interface (no pyplot, so no global figures and no display). Titles and captions
belong to the page. Rows are those of `fvq_jax.training.metric_files.read_metrics`; what they lack is left out.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from fvq_jax.ops.code_usage import usage_if_uniform

Rows = Sequence[Mapping[str, Any]]
Counts = Int[np.ndarray, "k"]
Arguments = ParamSpec("Arguments")
Drawing = TypeVar("Drawing", bound=Figure | None)

# Matplotlib knows no CSS variables: these greys, which no figure uses otherwise, stand for them.
_INK, _GRID, FIRST, SECOND, MUTED = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _GRID: "--line", FIRST: "--first", SECOND: "--second", MUTED: "--muted"}
_STYLE = matplotlib.RcParams(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.labelcolor": _INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "text.color": _INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "svg.fonttype": "none",
    }
)
WIDTH, _HEIGHT = 5.4, 3.4  # inches of 72 units
_SKY, _DEAD = "#10131c", "#ff5a4f"  # background and unused codes of the map; the same in both themes
MOST_POINTS = 1 << 17  # more codes than this are drawn as a density
DENSITY_MEANS = (
    " There are too many codes to draw as points. The colour of a cell says how often its codes were chosen on average "
    "without those never chosen; the larger their share, the redder the cell. A cell with more codes is more opaque."
)
_CELLS = 160  # of the density, along a side
_BELOW_TOP = 0.99  # this share of the cells have colours of their own; those above share the last
_CURVE_POINTS = 50


def styled(draw: Callable[Arguments, Drawing]) -> Callable[Arguments, Drawing]:
    """Lets a function draw in the style of the page, which `to_svg` needs."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawing:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `svg` element, the same for the same figure; `name` keeps its ids apart from those of others."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None}, dpi=144)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


@styled
def code_frequency_figure(counts: Counts) -> Figure:
    """How often each code was chosen, most frequent first, on logarithmic axes, against even use."""
    ranked = np.sort(counts)[::-1]
    size, tokens, hit = len(ranked), int(ranked.sum()), int(np.count_nonzero(ranked))
    figure, axes = new_axes()
    if hit:
        # Beyond the first ranks a logarithmic axis cannot show every rank.
        ranks = np.unique(np.geomspace(1, hit, 400).round().astype(int))
        axes.plot(ranks, ranked[ranks - 1], color=FIRST, linewidth=1.8, label="measured", **_markers(len(ranks)))
        axes.set_yscale("log")
    even = tokens / size
    axes.axhline(even, color=SECOND, linestyle="--", linewidth=1.3, label=f"even use, {even:,.3g} times each")
    if hit < size:
        label = f"never chosen, {size - hit:,} codes"
        axes.axvspan(hit + 0.5, size + 0.5, color=MUTED, alpha=0.2, linewidth=0, label=label)
    axes.set_xscale("log")
    axes.set_xlim(0.9, max(size, 2) * 1.1)
    _thousands(axes.xaxis, axes.yaxis)
    axes.set_xlabel("rank of the code (1: most frequent)")
    axes.set_ylabel("times chosen")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@styled
def usage_over_images_figure(first_use: Int64[np.ndarray, "k"], images: int, tokens_per_image: int) -> Figure:
    """Share of the codes chosen at least once in the first n pictures, over n, against even use.

    `first_use` [k] is the position of the first picture that a code was chosen for, at least `images` if there is none.
    """
    size = len(first_use)
    seen = np.unique(np.geomspace(1, images, _CURVE_POINTS).round().astype(np.int64))
    usage = np.searchsorted(np.sort(first_use), seen) / size
    figure, axes = new_axes()
    axes.plot(seen, usage, color=FIRST, linewidth=1.8, label="measured", **_markers(len(seen)))
    even = [usage_if_uniform(int(n) * tokens_per_image, size) for n in seen]
    axes.plot(seen, even, color=SECOND, linestyle="--", linewidth=1.3, label="expected for even use")
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _thousands(axes.xaxis)
    axes.set_xlabel(f"pictures seen ({tokens_per_image:,} tokens each)")
    axes.set_ylabel("codes chosen at least once")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@styled
def codebook_map_figure(
    points: Float[np.ndarray, "k 2"], share: Float[np.ndarray, "2"], counts: Counts, most_points: int = MOST_POINTS
) -> Figure:
    """Where the codes lie on two axes, coloured by how often each was chosen; codes never chosen are marked.

    `share` is the part of the variance along each axis. With more than `most_points` codes,
    cells take the place of points: their colour is the mean over the chosen codes in the cell, blended with red by the
    share of codes never chosen; their opacity says how many codes they hold.
    """
    figure, axes = new_axes(height=4.4)
    extend = None
    axes.set_facecolor(_SKY)
    axes.grid(False)
    alive = counts > 0
    dead_label = f"never chosen, {np.sum(~alive):,} codes"
    if len(points) <= most_points:
        area = float(np.clip(20_000 / len(points), 1.0, 26.0))
        order = np.flatnonzero(alive)[np.argsort(counts[alive], kind="stable")]  # the most frequent on top
        x, y = points[~alive].T
        dead_handle: Artist = axes.scatter(
            x, y, s=area * 1.6, marker="x", linewidths=0.8, color=_DEAD, rasterized=True, label=dead_label
        )
        x, y = points[order].T
        norm = LogNorm(1, max(2, counts.max()))
        colours: ScalarMappable = axes.scatter(
            x, y, s=area, c=counts[order], cmap="viridis", norm=norm, linewidths=0, rasterized=True
        )
    else:
        dead_handle = Patch(color=_DEAD, label=dead_label)
        colours = _density(axes, points, counts)
        extend = "max"
    ticks = LogLocator(subs=(1.0, 2.0, 5.0))
    bar = figure.colorbar(colours, ax=axes, label="times chosen", ticks=ticks, extend=extend, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    _thousands(bar.ax.yaxis)
    if not alive.all():
        figure.legend(handles=[dead_handle], loc="outside lower left")
    axes.set_xlabel(f"first principal axis ({share[0]:.1%} of the variance)")
    axes.set_ylabel(f"second principal axis ({share[1]:.1%})")
    return figure


def _density(axes: Axes, points: Float[np.ndarray, "k 2"], counts: Counts) -> ScalarMappable:
    """Draws the cells; returns which colour stands for how many times chosen."""
    edges = [np.linspace(low, high, _CELLS + 1) for low, high in zip(points.min(0), points.max(0), strict=True)]
    x, y = points.T
    codes, uses, used = (
        np.histogram2d(x, y, bins=edges, weights=weights)[0].T for weights in (None, counts, counts > 0)
    )
    mean = np.maximum(uses / np.maximum(used, 1), 1)
    # A few frequent codes, alone in their cells, would leave all others one colour.
    top = np.quantile(mean[used > 0], _BELOW_TOP) if used.any() else 2
    colours = ScalarMappable(LogNorm(1, max(2, top)), "viridis")
    dead = 1 - (used / np.maximum(codes, 1))[..., None]
    blended = (1 - dead) * colours.to_rgba(mean)[..., :3] + dead * np.array(to_rgb(_DEAD))
    opacity = np.where(codes > 0, 0.4 + 0.6 * np.log1p(codes) / np.log1p(codes.max()), 0)
    extent = (edges[0][0], edges[0][-1], edges[1][0], edges[1][-1])
    pixels = np.dstack([blended, opacity])
    axes.imshow(pixels, extent=extent, origin="lower", aspect="auto", interpolation="nearest")
    return colours


@styled
def usage_figure(
    rows: Rows, codebook_size: int, *, batch_tokens: int | None = None, window_tokens: int | None = None
) -> Figure | None:
    """Usage over training steps, one curve per named window (step, window, evaluation); None without a value.

    Where a window's size is known, the legend says what even use of the codes would show in it.
    """
    eval_tokens = max((int(row.get("eval/tokens") or 0) for row in rows), default=0)
    curves = (
        ("usage/batch", "one step", batch_tokens, {"color": MUTED, "linewidth": 1.0, "alpha": 0.8}),
        ("usage/window", "last steps", window_tokens, {"color": FIRST, "linewidth": 1.8}),
        ("eval/usage", "evaluation", eval_tokens, {"color": SECOND, "linewidth": 1.3, "marker": "o"}),
    )
    figure, axes = new_axes()
    for name, label, tokens, style in curves:
        steps, values = scalar_series(rows, name)
        if steps.size == 0:
            continue
        if tokens:
            label += f": {tokens:,} tokens (even use {usage_if_uniform(tokens, codebook_size):.1%})"
        axes.plot(steps, values, label=label, **_markers(steps.size) | style)
    if not axes.lines:
        return None
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_ylabel("codes chosen at least once")
    step_axis(axes)
    figure.legend(loc="outside lower left")
    return figure


@styled
def position_figure(usages: Float[np.ndarray, "p"]) -> Figure:
    """A bar for the usage of each position in a group; the dashed line is the mean, which is the usage of all codes."""
    figure, axes = new_axes()
    axes.bar(np.arange(len(usages)), usages, color=FIRST, width=0.8)
    axes.axhline(usages.mean(), color=SECOND, linestyle="--", linewidth=1.3)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_ylabel("codes chosen at least once")
    axes.set_xlabel("position in the group")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def loss_figure(rows: Rows) -> Figure | None:
    """One panel per loss term (`loss/...`) over steps, logarithmic where its values allow; None without a value."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("loss/"))
    series = {name: scalar_series(rows, name) for name in sorted(names, key=lambda name: name != "loss/total")}
    series = {name: points for name, points in series.items() if points[0].size}
    if not series:
        return None
    columns = min(len(series), 2)
    panel_rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(WIDTH, 1.9 * panel_rows), layout="constrained")
    panels = figure.subplots(panel_rows, columns, squeeze=False).flatten()
    for axes, (name, (steps, values)) in zip(panels, series.items(), strict=False):
        smoothed = _running_mean(values)
        if smoothed is None:
            axes.plot(steps, values, color=FIRST, linewidth=1.6, **_markers(steps.size))
        else:
            axes.plot(steps, values, color=FIRST, linewidth=0.7, alpha=0.35)
            axes.plot(steps, smoothed, color=FIRST, linewidth=1.6)
        logarithmic = values.min() > 0.0 and values.max() >= 3.0 * values.min()
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(name.removeprefix("loss/") + (" (log scale)" if logarithmic else ""))
        step_axis(axes, ticks=3)
    for axes in panels[len(series) :]:
        axes.remove()
    return figure


def new_axes(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    """A figure of the page's width, `height` inches high, with one set of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def scalar_series(rows: Rows, name: str) -> tuple[Int64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
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


def _markers(points: int) -> dict[str, Any]:
    """Lines of few points get markers, so that a single one is visible."""
    return {"marker": "o", "markersize": 3.5} if points <= 12 else {"markersize": 3.5}


def _thousands(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def step_axis(axes: Axes, ticks: int = 6) -> None:
    """Makes the horizontal axis one of training steps."""
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
