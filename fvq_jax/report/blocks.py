"""Parts that several pages have: tiles with a figure, plots with captions, tables of details."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from fvq_jax.evals.metric_table import METRICS
from fvq_jax.report import figures


def tile(name: str, value: float | int, note: str = "") -> str:
    """A metric's figure in a tile, with a note below it."""
    metric = METRICS[name]
    return (
        f'<div class="tile card"><span>{metric.heading}</span><b>{metric.text(value)} '
        f"<small>{metric.unit}</small></b><small>{note}</small></div>"
    )


def plots(drawn: Sequence[tuple[str, Figure, str]]) -> str:
    """Plots, each with title, figure and caption; an odd last one with a caption takes a whole row."""
    cards = []
    for title, figure, caption in drawn:
        svg = figures.to_svg(figure, "".join(c if c.isalnum() else "-" for c in title.lower()))
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
        wide = " wide" if caption and len(drawn) % 2 and title == drawn[-1][0] else ""
        words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        cards.append(f'<figure class="plot card{wide}"><h3>{escape(title)}</h3>{svg}{words}</figure>')
    return f'<div class="plots">{"".join(cards)}</div>'


def details(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of names and values that open on a click, by title; empty ones are left out."""
    parts = [
        f'<details class="card"><summary>{escape(title)}</summary><div class="scroll"><table><tbody>'
        + "".join(
            f'<tr><td><code>{escape(name)}</code></td><td class="text wrap">{escape(str(value))}</td></tr>'
            for name, value in table.items()
        )
        + "</tbody></table></div></details>"
        for title, table in tables.items()
        if table
    ]
    return "<h2>Details</h2>\n" + "\n".join(parts)
