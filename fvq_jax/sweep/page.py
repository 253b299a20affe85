"""The report of a sweep: `sweep.csv`, `sweep.md` and `index.html`, one self-contained page, in the sweep's workdir.

It can be written at any time: what is not finished is shown as such. The style is in `fvq_jax/report/page.html`.
"""

import collections
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fvq_jax.evals.metric_table import METRICS
from fvq_jax.report.blocks import details, plots
from fvq_jax.report.page import NONE, shell
from fvq_jax.report.page import PAGE as RUN_PAGE
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole
from fvq_jax.runtime.storage import REPORT
from fvq_jax.sweep import figures, table
from fvq_jax.sweep.table import Row

CSV, MARKDOWN, PAGE = "sweep.csv", "sweep.md", "index.html"
COSTS = ("seconds", "images_per_second", "parameters", "peak_memory_bytes")


def write_report(folder: Path) -> dict[str, Any]:
    """Gathers the points under `folder` and writes the three files there.

    Returns how many points there are of each status, and the files. InputError without points, or if a file cannot be
    written.
    """
    rows = table.gather(folder)
    linked = {row.record.name for row in rows if (folder / row.record.name / REPORT / RUN_PAGE).exists()}
    texts = {
        CSV: table.to_csv(rows),
        MARKDOWN: table.to_markdown(rows),
        PAGE: page(folder.resolve().name, rows, linked),
    }
    for name, text in texts.items():
        try:
            with replace_whole(folder / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {folder / name}: {error.strerror or error}") from error
    counts: collections.Counter[str] = collections.Counter(row.record.status for row in rows)
    return {"points": len(rows), **counts, "files": [str(folder / name) for name in texts]}


def page(title: str, rows: Sequence[Row], linked: Iterable[str] = ()) -> str:
    """The page as text; `linked` are the points whose run has a report of its own, which their names then lead to."""
    body = "\n".join((_header(title, rows), _points(rows, set(linked)), _figures(rows), _details(rows)))
    return shell(f"Sweep: {title}", body)


def _header(title: str, rows: Sequence[Row]) -> str:
    counts = collections.Counter(row.record.status for row in rows)
    tiles = "".join(
        f'<div class="tile card"><span>{status}</span><b>{count} <small>of {len(rows)}</small></b></div>'
        for status, count in counts.items()
    )
    fields = ", ".join(f"<b>{escape(field)}</b>" for field in table.swept_fields(rows))
    note = "" if set(counts) == {"finished"} else " · not finished: unfinished points show their last figures so far"
    lead = f'<p class="lead">over {fields or "nothing"}{note}</p>'
    return f'<h1>Sweep: {escape(title)}</h1>\n{lead}\n<div class="tiles">{tiles}</div>'


def _points(rows: Sequence[Row], linked: set[str]) -> str:
    fields, names = table.swept_fields(rows), table.columns(rows)
    short = table.short_names(fields)
    head = "".join(
        f"<th{kind}>{escape(name)}</th>"
        for kind, name in (
            ("", "#"),
            *((" class=text", short[field]) for field in fields),
            (" class=text", "Status"),
            *(("", METRICS[name].heading_with_unit) for name in names),
        )
    )
    lines = []
    for row in rows:
        number, name = str(row.record.index), escape(row.record.name)
        if row.record.name in linked:
            number = f'<a href="{name}/{REPORT}/{RUN_PAGE}" title="{name}">{number}</a>'
        swept = "".join(f'<td class="text">{escape(str(value))}</td>' for value in table.swept_values(row, fields))
        cells = "".join(f"<td>{table.shown(row, column) or NONE}</td>" for column in names)
        lines.append(f'<tr><td>{number}</td>{swept}<td class="text">{escape(row.status)}</td>{cells}</tr>')
        if table.problem(row):
            width = 2 + len(fields) + len(names)
            lines.append(f'<tr class="source"><td colspan="{width}">{escape(table.problem(row))}</td></tr>')
    return (
        '<h2>Points</h2>\n<p class="note">Scores are those of the last evaluation. A number '
        "leads to the report of its run, where there is one.</p>\n"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _figures(rows: Sequence[Row]) -> str:
    field, _ = table.series(rows)
    scores = table.scores(rows)
    groups = (
        (
            "Over the swept value",
            "Scores of the last evaluation. Hollow markers: points that are not finished.",
            [(f"{_heading(score)} over {field}", figures.swept_figure(rows, score)) for score in scores],
        ),
        (
            "Over training",
            "Every evaluation and window of training so far. Every run is annealed over its own length.",
            [
                *((f"{_heading(score)} over steps", figures.steps_figure(rows, score)) for score in scores),
                ("Codes used in windows of training over steps", figures.windows_figure(rows)),
            ],
        ),
        (
            "Cost against quality",
            "Numbers are those of the table. Times compare only between runs on equal hardware that was not shared. "
            "Parameters: of the main network, as trained. Memory: the fullest device, on a CPU the "
            "process.",
            [
                (
                    f"{_heading(score)} against {_inside(_heading(cost))}",
                    figures.cost_figure(rows, cost, score),
                )
                for cost in COSTS
                for score in scores
            ],
        ),
    )
    parts = []
    for title, note, figures_of in groups:
        drawn = [(name, figure, "") for name, figure in figures_of if figure is not None]
        if drawn:
            parts.append(f'<h2>{title}</h2>\n<p class="note">{note}</p>\n{plots(drawn)}')
    return "\n".join(parts)


def _heading(column: str) -> str:
    return METRICS[column].heading_with_unit


def _inside(name: str) -> str:
    """A column's name as it stands inside a title; units keep their capitals."""
    return name[0].lower() + name[1:]


def _details(rows: Sequence[Row]) -> str:
    return details({"What all points share": table.shared_config(rows)})
