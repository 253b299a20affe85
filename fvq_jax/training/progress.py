"""Shows how far a run is to the person who started it: as a bar on a terminal, else as lines of the log."""

import sys
import time
from collections.abc import Callable, Mapping

from absl import logging
from tqdm import tqdm


class Progress:
    """Shows how far the run is, on standard error: a bar if that is a terminal, else a log line per logged step.

    The bar may advance at every step; figures are given only when the loop has them on the host anyway, since
    asking the device for them would stall it.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        *,
        active: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total_steps
        self._active = active
        self._clock = clock
        self._origin = (start_step, clock())
        self._compiled = False
        self._bar: tqdm | None = None
        if active and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, step: int, figures: Mapping[str, str] | None = None) -> None:
        """Shows that `step` steps are done, and these figures by name. Without a terminal, no figures means no line."""
        if not self._active:
            return
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(step - self._bar.n)
        elif figures:
            words = [f"{name} {text}" for name, text in figures.items()]
            logging.info("%s", ", ".join([f"step {step}/{self._total}", *words, f"ETA {self._eta(step)}"]))
            if not self._compiled:  # the first line's time is mostly compilation and says nothing about the rest
                self._origin, self._compiled = (step, self._clock()), True

    def _eta(self, step: int) -> str:
        origin_step, origin_time = self._origin
        if step <= origin_step:
            return "?"
        return tqdm.format_interval((self._total - step) * (self._clock() - origin_time) / (step - origin_step))

    def close(self) -> None:
        """Leaves the bar as it stands and ends its line."""
        if self._bar is not None:
            self._bar.close()
