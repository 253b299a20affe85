"""Once imported, Python's wall clock jumps every half second: back by a day, on by a year, and back to the truth.

`time.monotonic` and its relatives, which are made for durations, go on as they are.
"""

import datetime
import os
import time

EVERY = 0.5  # seconds
DAY = 86_400
JUMPS = (0, -DAY, 365 * DAY)  # seconds from the truth
_time, _time_ns, _real, _start = time.time, time.time_ns, datetime.datetime, time.monotonic()


def jump():
    """Seconds from the truth, now; another process begins with another jump."""
    return JUMPS[int((time.monotonic() - _start) / EVERY + os.getpid()) % len(JUMPS)]


class _LikeReal(type(_real)):
    def __instancecheck__(cls, value):
        return isinstance(value, _real)


class Jumping(_real, metaclass=_LikeReal):
    @classmethod
    def now(cls, tz=None):
        return _real.fromtimestamp(time.time(), tz)


time.time = lambda: _time() + jump()
time.time_ns = lambda: _time_ns() + jump() * 10**9
datetime.datetime = Jumping
