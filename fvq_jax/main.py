"""Command line: `python -m fvq_jax.main --config=configs/fvq16k.py --workdir=DIR`.

The last line on standard output is the result as one JSON object. With `--explain` nothing runs: every field of the
config is printed with its value, its default and what it means. Exit codes: 0 the last step was reached, 2 bad input,
75 interrupted and saved (start me again), 1 anything else.
"""

import json
import sys

import jax
from absl import app, flags

from fvq_jax.config.checks import all_fields
from fvq_jax.config.explain import explain
from fvq_jax.runtime import exits
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.flags import CONFIG, WORKDIR, keep_compiled, parse_flags
from fvq_jax.runtime.logs import set_up_logging
from fvq_jax.runtime.processes import TIMEOUT, Place
from fvq_jax.tasks import task_of
from fvq_jax.training.loop import train
from fvq_jax.training.trace import parse_steps

DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Run as one of several processes: TPU pods and Slurm are detected, elsewhere give --coordinator, --num_processes "
    "and --process_id, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; the port must be free there")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are", 1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0", 0)
DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", TIMEOUT, "Seconds to wait for all processes at the start, and for one that fell silent", 1
)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "FIRST:LAST, the steps to trace into WORKDIR/profile")
EXPLAIN = flags.DEFINE_bool("explain", False, "Print every field of the config and what it means, and run nothing")


def main(argv: list[str]) -> int:
    """Trains; returns the exit code."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options start with --")
    if CONFIG.value is not None and EXPLAIN.value:
        sys.stdout.write(explain(CONFIG.value, all_fields(task_of(CONFIG.value), CONFIG.value)) + "\n")
        return 0
    if CONFIG.value is None or WORKDIR.value is None:
        raise InputError("--config=FILE and --workdir=DIR are both needed, see --help")
    keep_compiled(WORKDIR.value)
    task = task_of(CONFIG.value)
    result = train(task, CONFIG.value, WORKDIR.value, profile_steps=parse_steps(PROFILE_STEPS.value))
    if result.interrupted:
        return exits.INTERRUPTED
    if jax.process_index() == 0:
        sys.stdout.write(json.dumps(result.summary) + "\n")
        sys.stdout.flush()
    return 0


def _run(argv: list[str]) -> int:
    """Joins the other processes with `--distributed`, then runs `main`."""
    where = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    if not DISTRIBUTED.value and any(flag.present for flag in where):
        return exits.fail("--coordinator, --num_processes and --process_id do nothing without --distributed")
    set_up_logging()
    if not DISTRIBUTED.value:
        return exits.run(lambda: main(argv))
    place = Place(DISTRIBUTED_TIMEOUT.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    return exits.run(lambda: main(argv), place.join)


if __name__ == "__main__":
    app.run(_run, flags_parser=parse_flags)
