"""Ctrl-C while a program is still importing: one line and the exit code that `exits.run` gives afterwards.

It imports nothing that takes time, for it has to be there first: the package calls `guard` when one of its programs is
about to be run, and `exits.run` calls `done`.
"""

import os
import signal
from types import FrameType


def guard() -> None:
    """From now on SIGINT ends the program at once, unless somebody handles it already or it is to be ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def done() -> None:
    """From now on SIGINT raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # Not by an exception: a library that is being imported may catch it, or make another one of it.
    os.write(2, b"fvq_jax: interrupted by SIGINT: nothing was begun\n")
    os._exit(128 + number)
