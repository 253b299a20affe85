"""What a program logs: which lines are shown, and the log file of each host of a run."""

import contextlib
import logging as std_logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from absl import logging

LOGS = "logs"
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def set_up_logging() -> None:
    """Shows this package's lines from INFO on; of the libraries, which report every file they touch, only warnings."""
    logging.set_verbosity(logging.INFO)

    def keep(line: std_logging.LogRecord) -> bool:
        own = os.path.abspath(line.pathname).startswith(_PACKAGE)
        if not own:
            line.exc_info = None  # what an error means for the run is said by the package, in one line
        return line.levelno > std_logging.INFO or own

    logging.get_absl_handler().addFilter(keep)
    std_logging.raiseExceptions = False  # a log on a full disk is no reason to say more

    def note(ended: threading.ExceptHookArgs) -> None:
        logging.error("%s: %s", ended.thread and ended.thread.name, ended.exc_value)

    threading.excepthook = note

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, error, trace)
        else:  # a thread of a library, which raises what went wrong where its result is waited for
            logging.debug("%s", error)

    sys.excepthook = show


@contextlib.contextmanager
def host_log(workdir: str | os.PathLike[str], process_index: int) -> Iterator[None]:
    """What is logged inside goes to `workdir/logs/host_NNN.log` as well, and so does the error that ends it."""
    path = Path(workdir) / LOGS / f"host_{process_index:03d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = std_logging.FileHandler(path, delay=True)
    shown = logging.get_absl_handler()
    handler.setFormatter(shown.formatter)
    for keep in shown.filters:
        handler.addFilter(keep)
    root = std_logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        line = std_logging.LogRecord(
            "fvq_jax", std_logging.ERROR, __file__, 0, "%s: %s", (type(error).__name__, error), None
        )
        handler.handle(line)
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
