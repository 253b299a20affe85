"""SIGTERM and SIGINT as a flag that a program reads between two pieces of work, so that it can save and stop."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from absl import logging

Handler = Callable[[int, FrameType | None], Any] | int | None  # what `signal.signal` takes and returns
_END = 0  # no signal has this number


class Interrupt:
    """Context manager: inside it the signals only set `signal`; outside, the previous handlers are back.

    A second signal of the same kind is left to its previous handler, so that Ctrl-C twice ends a stuck program.

    Python runs a handler only when the main thread is back in Python, and compiling a step, which happens outside it,
    may take minutes. So a thread logs at once that a signal has come, and `then`, what the program is going to do. A
    program that is never away for long leaves it empty.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, then: str = "") -> None:
        self.signal: signal.Signals | None = None
        self._then = then
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> "Interrupt":
        if self._then:
            self._heard, self._hears = os.pipe()
            os.set_blocking(self._hears, False)
            # Into this pipe Python writes the number of every signal when it comes, whatever the main thread does.
            self._before = signal.set_wakeup_fd(self._hears, warn_on_full_buffer=False)
            self._speaker = threading.Thread(target=self._say, name="interrupt", daemon=True)
            self._speaker.start()
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._then:
            signal.set_wakeup_fd(self._before)
            os.write(self._hears, bytes([_END]))
            self._speaker.join()
            os.close(self._hears)
            os.close(self._heard)

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._previous[number])
        if self._then:  # a library's event loop may have had the signals for a while
            os.write(self._hears, bytes([number]))

    def _say(self) -> None:
        """Logs the first of the signals, in a thread of its own."""
        while (number := os.read(self._heard, 1)[0]) != _END:
            if number in self.SIGNALS:
                logging.warning("%s: %s", signal.Signals(number).name, self._then)
                return
