"""SIGTERM and SIGINT as a flag that the training loop reads between steps, so that it can save and stop."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None  # what `signal.signal` takes and returns


class Interrupt:
    """Context manager: inside it the signals only set `signal`; outside, the previous handlers are back.

    A second signal of the same kind is left to its previous handler, so that Ctrl-C twice ends a stuck program.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> "Interrupt":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._previous[number])
