"""Command line: `python -m fvq_jax.main --config=configs/fvq16k.py --workdir=DIR`.

The last line on standard output is the result as one JSON object. With `--explain` nothing runs: every field of the
config is printed with its value, its default and what it means. Exit codes: 0 the last step was reached, 2 bad input,
75 interrupted and saved (start me again), 1 anything else.
"""

import sys

import jax
from absl import app, flags

from fvq_jax.config.checks import all_fields
from fvq_jax.config.explain import explain
from fvq_jax.runtime import exits
from fvq_jax.runtime.allocation import keep_memory
from fvq_jax.runtime.clock import keep_steady
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import json_text
from fvq_jax.runtime.flags import CONFIG, ONE_RUN, PROFILE_STEPS, WORKDIR, keep_compiled, parse_flags, place
from fvq_jax.runtime.logs import set_up_logging
from fvq_jax.tasks import task_of
from fvq_jax.training.loop import train
from fvq_jax.training.run import divide_cpu_for
from fvq_jax.training.trace import parse_steps

EXPLAIN = flags.DEFINE_bool("explain", False, "Print every field of the config and what it means, and run nothing")
for _flag in (CONFIG, WORKDIR, *ONE_RUN):  # else --help would leave them out
    flags.declare_key_flag(_flag)


def main(argv: list[str]) -> int:
    """Trains; returns the exit code."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options start with --")
    if EXPLAIN.value:
        if CONFIG.value is None:
            raise InputError("--explain needs --config=FILE, the config to explain")
        sys.stdout.write(explain(CONFIG.value, all_fields(task_of(CONFIG.value), CONFIG.value)) + "\n")
        return 0
    if CONFIG.value is None or WORKDIR.value is None:
        raise InputError("--config=FILE and --workdir=DIR are both needed, see --help")
    keep_compiled(WORKDIR.value)
    config, task = CONFIG.value, task_of(CONFIG.value)
    if place() is None:  # several processes of one machine share its cores already
        divide_cpu_for(config)
    result = train(task, config, WORKDIR.value, profile_steps=parse_steps(PROFILE_STEPS.value))
    if result.interrupted:
        return exits.INTERRUPTED
    if jax.process_index() == 0:
        sys.stdout.write(json_text(result.summary) + "\n")
        sys.stdout.flush()
    return 0


def _run(argv: list[str]) -> int:
    """Runs `main`, as one of several processes if the flags say so."""
    keep_memory()
    keep_steady()
    set_up_logging()
    there = place()
    kept = "the steps since the last checkpoint are lost"
    return exits.run(lambda: main(argv), None if there is None else there.join, kept=kept)


if __name__ == "__main__":
    app.run(_run, flags_parser=parse_flags)
