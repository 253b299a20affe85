"""The figures of a sweep's report, in the style of `fvq_jax.report.figures`.

A point has the same colour and number in all of them, except where many points are divided into panels. What is not
finished is drawn hollow.
"""

import math
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from fvq_jax.evals.metric_table import METRICS
from fvq_jax.report.figures import WIDTH, new_axes, scalar_series, step_axis, styled
from fvq_jax.sweep.table import Row, series, short_names, swept_fields, swept_values

# Told apart on a light and on a dark page.
_COLOURS = ("#2f7ed8", "#e0701a", "#2a9d55", "#d0433a", "#8a5cd6", "#b58a1b", "#12a0ad", "#d6499f")
_Colour = str | tuple[float, float, float, float]


def label(row: Row, fields: Sequence[str]) -> str:
    """The point's number and what sets it apart."""
    short = short_names(fields)
    swept = zip(fields, swept_values(row, fields), strict=True)
    return f"{row.record.index}: " + ", ".join(f"{short[field]} {value}" for field, value in swept)


def steps_figure(rows: Sequence[Row], column: str) -> Figure | None:
    """A score of the evaluations over training steps, one curve per point; None without a value."""
    return _over_steps(rows, f"eval/{column}", column)


def windows_figure(rows: Sequence[Row]) -> Figure | None:
    """The usage of the windows in training over steps, one curve per point; None without a value."""
    return _over_steps(rows, "usage/window", "usage")


@styled
def _over_steps(rows: Sequence[Row], name: str, column: str) -> Figure | None:
    """What is logged as `name`, drawn as scores of this column are."""
    curves = {id(row): scalar_series(row.curves, name) for row in rows}
    if not any(steps.size for steps, _ in curves.values()):
        return None
    panels = _panels(rows)
    colours = dict(line[:2] for _, lines in panels for line in lines)
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    height = (3.4 if down == 1 else 2.3 * down) + 0.17 * len(colours)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, (title, lines) in zip(grid.flat, panels, strict=False):
        for text, colour, row in lines:
            steps, values = curves[id(row)]
            if steps.size:
                face = None if _done(row) else "none"
                (curve,) = axes.plot(steps, values, color=colour, linewidth=1.5, label=text)
                curve.set(marker="o", markersize=3.5, markerfacecolor=face)
        axes.set_title(title)
        step_axis(axes, ticks=6 if across == 1 else 3)
        _score_axis(axes, column)
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles = [Line2D([], [], color=colour, marker="o", markersize=3.5, label=text) for text, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower left", fontsize=8)
    return figure


def _panels(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, _Colour, Row]]]]:
    """(title, lines) of every panel; a line is a label, a colour and its point.

    One panel, and a colour for every point. Points that are more than there are colours are divided if they differ in
    several fields: a panel for every value of the first, and a colour for what else differs, if the colours suffice.
    """
    field, lines = series(rows)
    if len(rows) <= len(_COLOURS) or not 1 < len(lines) <= len(_COLOURS):
        fields = swept_fields(rows)
        return [("", [(label(row, fields), _colour(place, rows), row) for place, row in enumerate(rows)])]
    panels: dict[str, list[tuple[str, _Colour, Row]]] = {}
    for colour, (text, members) in zip(_COLOURS, lines, strict=False):
        for row in members:
            (value,) = swept_values(row, [field])
            panels.setdefault(f"{short_names([field])[field]} {value}", []).append((text, colour, row))
    return list(panels.items())


@styled
def swept_figure(rows: Sequence[Row], column: str) -> Figure | None:
    """A score over the field that is swept first, one line per combination of the others; None without a value."""
    if not any(column in row.values for row in rows):
        return None
    field, lines = series(rows)
    value_of = {id(row): _plain(swept_values(row, [field])[0]) for row in rows}
    order = list(dict.fromkeys(value_of.values()))
    numbers = sorted(value for value in order if isinstance(value, int | float) and not isinstance(value, bool))
    numeric = len(numbers) == len(order)
    order = [*numbers] if numeric else order
    positions: Sequence[float | int] = numbers if numeric else range(len(order))
    position_of = dict(zip(order, positions, strict=True))
    figure, axes = new_axes(height=3.4 + 0.17 * (len(lines) - 1))
    for place, (text, members) in enumerate(lines):
        colour = _COLOURS[place % len(_COLOURS)]
        scored = [row for row in members if column in row.values]
        scored.sort(key=lambda row: position_of[value_of[id(row)]])
        y = [row.values[column] / METRICS[column].divisor for row in scored]
        # Between words there are no values, so no line joins their markers; those of several lines stand side by side.
        aside = 0 if numeric else 0.1 * (place - (len(lines) - 1) / 2)
        x = [position_of[value_of[id(row)]] + aside for row in scored]
        if numeric:
            axes.plot(x, y, color=colour, linewidth=1.5)
        for row, across, up in zip(scored, x, y, strict=True):
            _marker(axes, across, up, colour, row)
        axes.plot([], [], color=colour, marker="o", linestyle="-" if numeric else "none", label=text)
    if not numeric:
        axes.set_xlim(-0.5, len(order) - 0.5)
    if numeric and positions[0] > 0 and positions[-1] >= 8 * positions[0]:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(positions))
    axes.xaxis.set_minor_locator(NullLocator())
    names = {value: f"{value:,}" if numeric else str(value) for value in order}
    axes.set_xticks(axes.get_xticks(), [names[value] for value in order], rotation=30 if len(order) > 6 else 0)
    axes.set_xlabel(field)
    _score_axis(axes, column)
    if len(lines) > 1:
        figure.legend(loc="outside lower left", fontsize=8)
    return figure


@styled
def cost_figure(rows: Sequence[Row], cost: str, column: str) -> Figure | None:
    """A score against what it costs, one numbered marker per point; None if no point has both."""
    figure, axes = new_axes()
    found = [(place, row) for place, row in enumerate(rows) if cost in row.values and column in row.values]
    if not found:
        return None
    for place, row in found:
        x, y = row.values[cost] / METRICS[cost].divisor, row.values[column]
        _marker(axes, x, y, _colour(place, rows), row)
        axes.annotate(str(row.record.index), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    costs = [row.values[cost] for _, row in found]
    if min(costs) > 0 and max(costs) >= 8 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.set_xlabel(METRICS[cost].heading_with_unit)
    _score_axis(axes, column)
    return figure


def _done(row: Row) -> bool:
    return row.record.status == "finished"


def _plain(value: object) -> float | int | str:
    """A value that can be looked up: lists (of a field such as ch_mult) as text."""
    return value if isinstance(value, int | float | str) else str(value)


def _colour(place: int, rows: Sequence[Row]) -> _Colour:
    if len(rows) <= len(_COLOURS):
        return _COLOURS[place]
    return matplotlib.colormaps["turbo"](0.06 + 0.88 * place / (len(rows) - 1))


def _marker(axes: Axes, x: float | int, y: float | int, colour: _Colour, row: Row) -> None:
    face = colour if _done(row) else "none"
    axes.plot([x], [y], marker="o", markersize=6, markeredgecolor=colour, markerfacecolor=face, linestyle="none")


def _score_axis(axes: Axes, column: str) -> None:
    axes.set_ylabel(METRICS[column].heading_with_unit)
    if METRICS[column].format.endswith("%"):  # a share
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
