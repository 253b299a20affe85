"""What the programs of this package share: exit codes, and errors as one line on standard error."""

import argparse
import os
import sys
from typing import NoReturn

import jax

from fvq_jax.errors import InputError

BAD_INPUT, INTERRUPTED, FAILED = 2, 75, 1


def fail(message: str, code: int = BAD_INPUT) -> int:
    """Writes the message as one line; returns the exit code."""
    sys.stderr.write(f"fvq_jax: {' '.join(message.split())}\n")
    return code


def true_or_false(text: str) -> bool:
    """An argument that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def join_processes() -> None:
    """Makes this one of several processes: TPU pods and Slurm are detected, elsewhere JAX_* variables say so.

    InputError if the others cannot be joined.
    """
    # JAX reads the coordinator's address itself, but not the other two.
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=count and int(count), process_id=index and int(index))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--distributed: cannot join the other processes: {error}") from error


class Parser(argparse.ArgumentParser):
    """argparse, with bad arguments reported by `fail` instead of in several lines."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        sys.exit(fail(f"{message} (see python -m {self.prog} --help)"))
