"""Command line: runs every point of a config's `sweep()`, or gathers what they have logged into a report.

  python -m fvq_jax.sweep --config=configs/ablations/codebook_size.py --workdir=DIR [--config.FIELD=VALUE ...]
      [--parallel=N] [--shard=I/N] [--index=I] [--dry-run]
  python -m fvq_jax.sweep report DIR

Every point is a run of `fvq_jax.main` in DIR/NAME. Started again, a sweep skips what is finished and goes on with the
rest. The last line on standard output is the result as one JSON object. Exit codes: 0 nothing is left for this call to
run, 2 bad input (also if points were refused, and none failed), 75 interrupted and saved (start me again), 1 a point
failed. docs/sweeps.md says more.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from fvq_jax.runtime import exits
from fvq_jax.runtime.arguments import Parser, some_path
from fvq_jax.runtime.config_file import explained, run_file
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.exits import BAD_INPUT, FAILED, INTERRUPTED
from fvq_jax.runtime.files import json_text
from fvq_jax.runtime.flags import CONFIG, ONE_RUN, WORKDIR, parse_flags
from fvq_jax.sweep.page import write_report
from fvq_jax.sweep.points import Point, command, joined_argument, make_points, read_sweep
from fvq_jax.sweep.runner import Outcome, run_points

INDEX = flags.DEFINE_integer("index", None, "Run this point alone, counted from 0", lower_bound=0)
PARALLEL = flags.DEFINE_integer("parallel", 1, "Points at a time on this machine", lower_bound=1)
SHARD = flags.DEFINE_string("shard", "0/1", "I/N: this is sweep I, from 0, of N that share the points")
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Print the points and their commands, and run nothing")
for _flag in (CONFIG, WORKDIR):  # else --help would leave them out
    flags.declare_key_flag(_flag)


def main(argv: list[str]) -> int:
    """Runs the chosen points; returns the exit code."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options start with --")
    if CONFIG.value is None or WORKDIR.value is None:
        raise InputError("--config=FILE and --workdir=DIR are both needed, see --help")
    for flag in ONE_RUN:
        if flag.present:
            raise InputError(f"--{flag.name} is for a single run (fvq_jax.main); hosts share a sweep by --shard=I/N")
    logging.set_verbosity(logging.INFO)
    config_flag = flags.FLAGS["config"]
    config_file, given = config_flags.get_config_filename(config_flag), config_flags.get_override_values(config_flag)

    def command_of(point: Point) -> list[str]:
        return command(point, config_file, given)

    def with_argument(argument: str) -> ConfigDict:
        path, _, whole = joined_argument(config_file, argument).partition(":")
        get_config = run_file(path)["get_config"]
        with explained(path):
            config = get_config(whole)
        config.update_from_flattened_dict(given)
        return config

    points = make_points(CONFIG.value, read_sweep(config_file), Path(WORKDIR.value), given, with_argument)
    chosen = choose(points, INDEX.value, SHARD.value)
    if DRY_RUN.value:
        sys.stdout.write("".join(f"{_described(point)}\n  {shlex.join(command_of(point))}\n" for point in chosen))
        result, code = {"points": len(chosen)}, 0
    else:
        outcomes = run_points(chosen, command_of, PARALLEL.value)
        result, code = summary(outcomes) | {"workdir": WORKDIR.value}, exit_code(outcomes)
    sys.stdout.write(json_text(result) + "\n")
    sys.stdout.flush()
    return code


def choose(points: Sequence[Point], index: int | None, shard: str) -> list[Point]:
    """The points of this call. InputError for an index or a shard that does not exist."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard={shard} must be I/N with I from 0 to N - 1, for instance --shard=0/4")
    if index is not None and int(match[2]) > 1:
        raise InputError(f"--index={index} already is one point: leave --shard={shard} out")
    if index is None:
        return list(points[int(match[1]) :: int(match[2])])
    if index >= len(points):
        raise InputError(f"--index={index}: this sweep has {len(points)} points, counted from 0")
    return [points[index]]


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The result line: how many points there are and how many are finished, and by name what became of the others."""

    def named(status):
        return [outcome.point.name for outcome in outcomes if outcome.status == status]

    def explained(status):
        return [
            {"point": ended.point.name, "exit_code": ended.exit_code, "error": ended.error, "log": str(ended.log)}
            for ended in outcomes
            if ended.status == status
        ]

    return {
        "points": len(outcomes),
        "finished": len(named("finished")),
        "run_now": sum(outcome.ran for outcome in outcomes),
        "failed": explained("failed"),
        "refused": explained("refused"),
        "interrupted": named("interrupted"),
        "elsewhere": named("elsewhere"),
        "waiting": named("waiting"),
    }


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """The exit code, as the text at the top of this module explains."""
    found = {outcome.status for outcome in outcomes}
    if found & {"interrupted", "waiting"}:
        return INTERRUPTED
    return FAILED if "failed" in found else BAD_INPUT if "refused" in found else 0


def _described(point: Point) -> str:
    sizes = point.config["mesh.data"], point.config["mesh.codebook"]
    devices = f"{point.devices} devices"
    if -1 in sizes:
        devices = "any number of devices" if point.devices == 1 else f"a multiple of {devices}"
    refused = f"; refused: {point.refused}" if point.refused else ""
    return f"{point.index} {point.name} ({devices}{refused})"


def _report(argv: list[str]) -> int:
    parser = Parser(prog="fvq_jax.sweep report", description="Gathers the points of a sweep, finished or not.")
    parser.add_argument("workdir", metavar="DIR", type=some_path, help="--workdir of the sweep")
    result = write_report(parser.parse_args(argv).workdir)
    sys.stdout.write(json_text(result) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        sys.exit(exits.run(lambda: _report(sys.argv[2:])))
    app.run(
        lambda argv: exits.run(lambda: main(argv), kept="points keep what they saved", resumes=True),
        flags_parser=parse_flags,
    )
