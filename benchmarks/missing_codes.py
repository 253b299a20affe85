"""A picture of the rows of `count_codes.py`: the share of codes never chosen over the tokens counted.

  python benchmarks/missing_codes.py --out=PICTURE.png "65,536 codes=ROWS1" "262,144 codes=ROWS2"

Each file holds what `count_codes.py` printed. What even use would leave out is drawn beside them. Where a curve ends at
no missing code, its last point stands on the lower edge.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

LEAST = 1e-6  # the lower edge: less than one code of a million


def rows_of(path):
    """The rows of a file, which may hold other lines too. ValueError if there are none."""
    found = [json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{")]
    rows = [row for row in found if {"tokens_per_code", "codes", "dead_codes"} <= row.keys()]
    if not rows:
        raise ValueError(f"{path} holds no rows of count_codes.py")
    return rows


def draw(runs):
    """The figure of several runs, {name: rows}."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in runs.items():
        share = [max(row["dead_codes"] / row["codes"], LEAST) for row in rows]
        axes.loglog([row["tokens_per_code"] for row in rows], share, marker="o", markersize=4, label=name)
    most = max(row["tokens_per_code"] for rows in runs.values() for row in rows)
    tokens = np.geomspace(1, min(most, -math.log(LEAST)), 50)
    axes.loglog(tokens, np.exp(-tokens), color="grey", linestyle="--", label="even use")
    axes.set(xlabel="tokens counted, for every code", ylabel="codes never chosen", ylim=(LEAST, 1))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.grid(True, alpha=0.4)
    axes.legend(frameon=False, loc="lower left")
    return figure


def main():
    """Draws the picture, or says in one line why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=ROWS", help="a name and a file of rows")
    parser.add_argument("--out", required=True, type=Path, help="the picture, .png or .svg")
    args = parser.parse_args()
    if unnamed := [run for run in args.runs if "=" not in run]:
        parser.error(f"{unnamed[0]} is not NAME=ROWS")
    try:
        draw({name: rows_of(path) for name, path in (run.rsplit("=", 1) for run in args.runs)}).savefig(
            args.out, dpi=100
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
