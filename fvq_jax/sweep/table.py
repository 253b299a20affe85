"""What the points of a sweep have come to, as rows of one table: gathered from their workdirs, finished or not.

How the rows look on a page is left to `page`.
"""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fvq_jax.evals.metric_table import METRICS
from fvq_jax.runtime.errors import InputError
from fvq_jax.sweep.points import LOG, RECORD, Record, read_record
from fvq_jax.tasks import TASKS
from fvq_jax.training.metric_files import METRICS_FILE, read_metrics

SILENT_SECONDS = 600.0  # without a line of log or metrics, after which a run is said to be silent
# The columns after the swept fields.
COLUMNS = (
    "step",
    "usage",
    "mean_usage",
    "perplexity",
    "quantization_error",
    "psnr",
    "ssim",
    "lpips_vgg",
    "rfid",
    "nll_bits",
    "bigram_bits",
    "fid",
    "class_accuracy",
    "class_accuracy_unguided",
    "best_guidance",
    "samples_per_second",
    "parameters",
    "seconds",
    "images_per_second",
    "peak_memory_bytes",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One point.

    Attributes:
      record: what the sweep knows of it.
      values: by the names of `COLUMNS`, as far as there are any yet.
      curves: what training has logged, for figures over steps.
      silent: seconds since its last sign of life, if it should be running and has given none for a while; else 0.
    """

    record: Record
    values: Mapping[str, float | int]
    curves: Sequence[Mapping[str, Any]]
    silent: float = 0.0

    @property
    def status(self) -> str:
        """The status, as a person reads it."""
        if self.silent:
            return f"running? silent for {self.silent / 60:,.0f} min"
        return self.record.status


def gather(folder: Path, now: float | None = None) -> list[Row]:
    """The points under a sweep's workdir, in the order of the sweep. InputError if there is none."""
    records = [(path.parent, read_record(path.parent)) for path in sorted(folder.glob(f"*/{RECORD}"))]
    rows = [_row(workdir, record, time.time() if now is None else now) for workdir, record in records if record]
    if not rows:
        raise InputError(f"no point of a sweep in {folder}: give the --workdir of a sweep that was started")
    return sorted(rows, key=lambda row: (row.record.index, row.record.name))


def _row(workdir: Path, record: Record, now: float) -> Row:
    curves = read_metrics(workdir)
    values = {"step": curves[-1]["step"]} if curves else {}
    for line in curves:  # later values replace earlier ones
        values |= {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
        values |= {name: value for name, value in line.items() if name in ("step", "images_per_second")}
    values |= _mean_usage(curves)
    memory = [line["memory/peak_bytes"] for line in curves if line.get("memory/peak_bytes")]
    values |= {"peak_memory_bytes": max(memory)} if memory else {}
    values |= record.summary
    finite = {name: values[name] for name in COLUMNS if _is_number(values.get(name))}
    signs = [path.stat().st_mtime for name in (RECORD, LOG, METRICS_FILE) if (path := workdir / name).exists()]
    quiet = now - max(signs)
    return Row(record, finite, curves, quiet if record.status == "running" and quiet > SILENT_SECONDS else 0.0)


def _mean_usage(curves: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over training of the usage in windows; a line through the windows' ends is integrated over the steps."""
    usage = {line["step"]: line["usage/window"] for line in curves if "usage/window" in line}
    if len(usage) < 2:
        return {}
    steps, values = np.array(sorted(usage)), np.array([usage[step] for step in sorted(usage)])
    return {"mean_usage": float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def swept_fields(rows: Sequence[Row]) -> list[str]:
    """The fields that any point replaces, in the order of the sweep."""
    return list(dict.fromkeys(field for row in rows for field in row.record.overrides))


def swept_values(row: Row, fields: Sequence[str]) -> list[Any]:
    """What the fields are in this point; for one that it does not replace, what its config says."""
    return [row.record.overrides.get(field, row.record.config.get(field)) for field in fields]


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """The last part of each field's name, or all of it where two would be the same."""
    last = [field.rsplit(".", 1)[-1] for field in fields]
    return {field: short if last.count(short) == 1 else field for field, short in zip(fields, last, strict=True)}


def scores(rows: Sequence[Row]) -> Sequence[str]:
    """The scores of the task that these points train, which are shown in any case."""
    return TASKS[rows[0].record.config.get("task", "tokenizer")].scores


def columns(rows: Sequence[Row]) -> list[str]:
    """Which of `COLUMNS` to show: the step, and what is a score of the task or has a value in any point."""
    always = ("step", *scores(rows)[:2])
    return [name for name in COLUMNS if name in always or any(name in row.values for row in rows)]


def shown(row: Row, column: str) -> str:
    """A value for people; empty without one."""
    return METRICS[column].text(row.values.get(column))


def problem(row: Row) -> str:
    """What went wrong, and where to read more; empty if nothing did."""
    record = row.record
    if record.status not in ("failed", "refused"):
        return ""
    return f"exit code {record.exit_code}: {record.error} ({record.name}/{LOG})"


def to_csv(rows: Sequence[Row]) -> str:
    """One line per point, values in full; bytes and fractions as they are."""
    fields, names, file = swept_fields(rows), columns(rows), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["point", *fields, "status", *names, "error"])
    for row in rows:
        values = [row.values.get(name, "") for name in names]
        writer.writerow([row.record.name, *swept_values(row, fields), row.status, *values, problem(row)])
    return file.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for people, with what went wrong below it."""
    fields, names = swept_fields(rows), columns(rows)
    short = short_names(fields)
    lines = [[*(short[field] for field in fields), "Status", *(METRICS[name].heading_with_unit for name in names)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        swept = [str(value).replace("|", "\\|") for value in swept_values(row, fields)]
        lines.append([*swept, row.status, *(shown(row, name) for name in names)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    problems = "".join(f"- `{row.record.name}` {row.status}, {problem(row)}\n" for row in rows if problem(row))
    return text + (f"\n{problems}" if problems else "")


def series(rows: Sequence[Row]) -> tuple[str, list[tuple[str, list[Row]]]]:
    """How to draw the points over one field: its name, and the lines, each with a label and its rows.

    The field is the first swept one that differs between points. The others that differ tell the lines apart, except
    those that follow from the first (a bridge that grows with the codebook, for instance).
    """
    fields = swept_fields(rows)
    values = {field: [repr(swept_values(row, [field])[0]) for row in rows] for field in fields}
    varied = [field for field in fields if len(set(values[field])) > 1] or fields[:1]
    if not varied:
        return "", [("", list(rows))]
    first, short = varied[0], short_names(fields)
    free = [
        field
        for field in varied[1:]
        if len(set(zip(values[first], values[field], strict=True))) > len(set(values[first]))
    ]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{short[field]} {value}" for field, value in zip(free, swept_values(row, free), strict=True))
        lines.setdefault(label, []).append(row)
    return first, list(lines.items())


def shared_config(rows: Sequence[Row]) -> dict[str, Any]:
    """The fields that are the same in all points, by full name, without those that are swept."""
    fields, configs = swept_fields(rows), [row.record.config for row in rows]
    return {
        name: value
        for name, value in configs[0].items()
        if name not in fields and all(config.get(name) == value for config in configs)
    }
