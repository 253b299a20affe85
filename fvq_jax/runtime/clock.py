"""The clock on the wall, which may be set at any time, and libraries that take it for one that measures durations."""

import time

wall = time.time  # seconds since 1970, as the clock is now; for stamps that other programs read


def keep_steady() -> None:
    """From now on `time.time` and `time.time_ns` go on evenly from what they say now, in this process alone.

    If the clock is set on while it writes a checkpoint, Orbax takes its time to be up and fails; if the clock is set
    back by some weeks, TensorBoard's thread fails.
    """
    began, at_first = time.monotonic_ns(), time.time_ns()

    def time_ns() -> int:
        return at_first + time.monotonic_ns() - began

    time.time_ns, time.time = time_ns, lambda: time_ns() / 1e9
