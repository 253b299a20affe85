"""Command lines of the programs that read no config: argparse with errors in one line, and the options they share."""

import argparse
import sys
from typing import NoReturn

from fvq_jax.runtime.exits import fail
from fvq_jax.runtime.processes import TIMEOUT, Place


class Parser(argparse.ArgumentParser):
    """argparse, with bad arguments reported by `fail` instead of in several lines."""

    def error(self, message: str) -> NoReturn:
        """Writes the message in one line and ends the program with exit code 2."""
        sys.exit(fail(f"{message} (see python -m {self.prog} --help)"))


def true_or_false(text: str) -> bool:
    """Converts an argument that must be true or false; for `type` of argparse."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds the options that make a program one of several processes; `place` reads them."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of several processes: found on TPU pods and in Slurm, elsewhere give the next three options",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of the first process; a port that is free there"
    )
    parser.add_argument("--num_processes", type=int, help="how many processes there are")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--distributed_timeout",
        type=int,
        default=TIMEOUT,
        help="seconds to wait for all processes at the start, later for one that fell silent (default: %(default)s)",
    )


def place(args: argparse.Namespace) -> Place | None:
    """The place among several processes, from the options of `add_place`; None for a process that runs alone.

    Ends the program if the options give a place without `--distributed`.
    """
    where = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed:
        return Place(args.distributed_timeout, *where)
    if where != (None, None, None):
        sys.exit(fail("--coordinator, --num_processes and --process_id do nothing without --distributed"))
    return None
