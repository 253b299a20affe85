"""What the programs of this package share: exit codes, and errors as one line on standard error."""

import argparse
import sys
from typing import NoReturn

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


class Parser(argparse.ArgumentParser):
    """argparse, with bad arguments reported by `fail` instead of in several lines."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        sys.exit(fail(f"{message} (see python -m {self.prog} --help)"))
