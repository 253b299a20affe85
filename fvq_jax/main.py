"""Command line: `python -m fvq_jax.main --config=configs/fvq16k.py --workdir=DIR [--mode=train|eval]`.

The last line on standard output is the result as one JSON object. Exit codes: 0 the last step was reached,
2 bad input, 75 interrupted and saved (start me again), 1 anything else.
"""

import json
import logging as std_logging
import os
import re
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from fvq_jax.command import BAD_INPUT, FAILED, INTERRUPTED, fail, join_processes
from fvq_jax.errors import InputError, NonFiniteError
from fvq_jax.train import evaluate_checkpoint, train

CONFIG = config_flags.DEFINE_config_file("config", help_string="The run, for instance configs/fvq16k.py:smoke")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, report")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes: TPU pods and Slurm are detected, elsewhere set JAX_COORDINATOR_ADDRESS, "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "eval: score the last checkpoint")


def main(argv: list[str]) -> int:
    """Runs the chosen mode; returns the exit code."""
    if len(argv) > 1:
        return fail(f"unexpected argument {argv[1]!r}: options start with --", BAD_INPUT)
    if CONFIG.value is None or WORKDIR.value is None:
        return fail("--config=FILE and --workdir=DIR are both needed, see --help", BAD_INPUT)
    _set_up_logging()
    run = train if MODE.value == "train" else evaluate_checkpoint
    try:
        if DISTRIBUTED.value:
            join_processes()
        result = run(CONFIG.value, WORKDIR.value)
    except InputError as error:
        return fail(str(error), BAD_INPUT)
    except NonFiniteError as error:
        return fail(str(error), FAILED)
    if result.interrupted:
        return INTERRUPTED
    if jax.process_index() == 0:
        sys.stdout.write(json.dumps(result.summary) + "\n")
        sys.stdout.flush()
    return 0


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line, config file and overrides; anything wrong there is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.keys()  # a file that could not be read raises here, and not before
        return rest
    except (KeyError, AttributeError) as error:
        names = re.findall(r"\w+", str(error).replace("\\n", " "))
        hint = f"; did you mean {names[4]}?" if names[1:4] == ["Did", "you", "mean"] else ""
        sys.exit(fail(f"unknown config field {names[0]}{hint}", BAD_INPUT))
    except (flags.Error, InputError, TypeError, ValueError, OSError) as error:
        sys.exit(fail(_last_line(error), BAD_INPUT))


def _last_line(error: Exception) -> str:
    """What went wrong, without the traceback that ml_collections puts into its message."""
    text = str(error).strip()
    if "Traceback (most recent call last)" not in text:
        return text
    return re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])


def _set_up_logging() -> None:
    """This package's lines from INFO on; of the libraries, which report every file they touch, only warnings."""
    logging.set_verbosity(logging.INFO)
    package = os.path.dirname(os.path.abspath(__file__)) + os.sep

    def keep(line):
        return line.levelno > std_logging.INFO or os.path.abspath(line.pathname).startswith(package)

    logging.get_absl_handler().addFilter(keep)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
