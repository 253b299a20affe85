"""Command line: `python -m fvq_jax.main --config=configs/fvq16k.py --workdir=DIR`.

The last line on standard output is the result as one JSON object. Exit codes: 0 the last step was reached,
2 bad input, 75 interrupted and saved (start me again), 1 anything else.
"""

import contextlib
import json
import logging as std_logging
import os
import re
import socket
import sys
import threading
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from fvq_jax.command import BAD_INPUT, FAILED, INTERRUPTED, fail, join_processes
from fvq_jax.errors import InputError, NonFiniteError, RunError
from fvq_jax.last_words import last_words
from fvq_jax.profile import parse_steps
from fvq_jax.train import train

CONFIG = config_flags.DEFINE_config_file("config", help_string="The run, for instance configs/fvq16k.py:smoke")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, report")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes: TPU pods and Slurm are detected, elsewhere give --coordinator, --num_processes and "
    "--process_id, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; the port must be free there")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are", 1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0", 0)
DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 120, "Seconds to wait for all processes at the start, and for one that fell silent", 1
)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "FIRST:LAST, the steps to trace into WORKDIR/profile")
PLACE = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
ONE_RUN = (DISTRIBUTED, *PLACE, DISTRIBUTED_TIMEOUT, PROFILE_STEPS)  # a sweep takes the other flags too

# In the errors of collectives and of JAX's coordination service.
_OTHERS = re.compile(r"Gloo|NCCL|Connection (reset|closed)|UNAVAILABLE|heartbeat|Barrier|coordination service")
_WORDS = (
    "fvq_jax: process {} on {} was ended from outside: another process of the run fell silent, or this one was killed; "
    "start all of them again"
)


def main(argv: list[str]) -> int:
    """Trains; returns the exit code."""
    if len(argv) > 1:
        return fail(f"unexpected argument {argv[1]!r}: options start with --", BAD_INPUT)
    if CONFIG.value is None or WORKDIR.value is None:
        return fail("--config=FILE and --workdir=DIR are both needed, see --help", BAD_INPUT)
    if not DISTRIBUTED.value and any(flag.present for flag in PLACE):
        return fail("--coordinator, --num_processes and --process_id do nothing without --distributed", BAD_INPUT)
    _set_up_logging()
    try:
        return _train()
    except InputError as error:
        return fail(str(error), BAD_INPUT)
    except NonFiniteError as error:  # found by all processes, none of which may leave the others early
        return fail(str(error), FAILED)
    except RunError as error:
        _leave(str(error))
    except Exception as error:
        if jax.process_count() == 1 or not _OTHERS.search(str(error)):
            raise
        _leave(f"lost another process of this run: {str(error).strip().splitlines()[0]}; start all of them again")


def _train() -> int:
    """As one of several processes if told so."""
    with contextlib.ExitStack() as stack:
        if DISTRIBUTED.value:
            join_processes(
                DISTRIBUTED_TIMEOUT.value,
                coordinator=COORDINATOR.value,
                count=NUM_PROCESSES.value,
                index=PROCESS_ID.value,
            )
            stack.enter_context(last_words(_WORDS.format(jax.process_index(), socket.gethostname())))
        keep_compiled(WORKDIR.value)
        result = train(CONFIG.value, WORKDIR.value, profile_steps=parse_steps(PROFILE_STEPS.value))
    if result.interrupted:
        return INTERRUPTED
    if jax.process_index() == 0:
        sys.stdout.write(json.dumps(result.summary) + "\n")
        sys.stdout.flush()
    return 0


def _leave(message: str) -> NoReturn:
    """Ends the program at once, without waiting for threads and processes that may hang."""
    fail(message)
    sys.stdout.flush()
    os._exit(FAILED)


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


def keep_compiled(workdir: str) -> None:
    """Compiled programs stay in the workdir, so that a restart begins at once; JAX_COMPILATION_CACHE_DIR goes first."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.abspath(workdir), "compilation_cache"))


def _set_up_logging() -> None:
    """This package's lines from INFO on; of the libraries, which report every file they touch, only warnings."""
    logging.set_verbosity(logging.INFO)
    package = os.path.dirname(os.path.abspath(__file__)) + os.sep

    def keep(line):
        if not os.path.abspath(line.pathname).startswith(package):
            line.exc_info = None  # what an error means for the run is said by the package, in one line
        return line.levelno > std_logging.INFO or os.path.abspath(line.pathname).startswith(package)

    logging.get_absl_handler().addFilter(keep)
    std_logging.raiseExceptions = False  # a log on a full disk is no reason to say more

    def note(ended):
        logging.error("%s: %s", ended.thread.name, ended.exc_value)

    threading.excepthook = note

    def show(kind, error, trace):
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, error, trace)
        else:  # a thread of a library, which raises what went wrong where its result is waited for
            logging.debug("%s", error)

    sys.excepthook = show


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
