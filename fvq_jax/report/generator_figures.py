"""The figures of a generator's report, in the style of `fvq_jax.report.figures`."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fvq_jax.evals.metric_table import METRICS
from fvq_jax.report.figures import FIRST, MUTED, SECOND, WIDTH, Rows, new_axes, scalar_series, step_axis, styled

_BASELINES = (("eval/unigram_bits", "unigram", ":"), ("eval/bigram_bits", "bigram", "--"))


@styled
def bits_figure(rows: Rows) -> Figure | None:
    """Bits per code over training steps, in training and held out, beside unigram and bigram; None without a value.

    The two baselines are those of the last evaluation that has them.
    """
    figure, axes = new_axes()
    steps, values = scalar_series(rows, "nll_bits")
    if steps.size:
        axes.plot(steps, values, color=MUTED, linewidth=1.0, label="training, with dropout")
    steps, values = scalar_series(rows, "eval/nll_bits")
    if steps.size:
        axes.plot(steps, values, color=FIRST, linewidth=1.8, marker="o", markersize=3.5, label="held out")
    if not axes.lines:
        return None
    for name, label, line in _BASELINES:
        _, values = scalar_series(rows, name)
        if values.size:
            label = f"{label}, {values[-1]:.2f}"
            axes.axhline(values[-1], color=SECOND, linestyle=line, linewidth=1.3, label=label)
    axes.set_ylabel("bits per code")
    step_axis(axes)
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@styled
def guidance_figure(guidances: Sequence[float], scores: Sequence[Mapping[str, float]]) -> Figure | None:
    """Every score over guidance, a panel each; the best value is marked. None for fewer than two values of guidance."""
    if len(set(guidances)) < 2:
        return None
    order = np.argsort(guidances, kind="stable")
    names = [
        name
        for name, metric in METRICS.items()
        if metric.larger_is_better is not None and sum(name in found for found in scores) > 1
    ]
    if not names:
        return None
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH * columns / 2, 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        metric = METRICS[name]
        points = [(guidances[i], scores[i][name] / metric.divisor) for i in order if name in scores[i]]
        x, y = np.array(points, np.float64).T
        axes.plot(x, y, color=FIRST, linewidth=1.8, marker="o", markersize=3.5)
        finite = np.flatnonzero(np.isfinite(y))
        if finite.size:
            best = finite[np.argmax(y[finite]) if metric.larger_is_better else np.argmin(y[finite])]
            axes.plot(x[best], y[best], color=SECOND, marker="o", markersize=7, fillstyle="none")
        if metric.format.endswith("%"):
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_title(metric.heading_with_unit)
        axes.set_xlabel("guidance")
    for axes in panels[len(names) :]:
        axes.remove()
    return figure
