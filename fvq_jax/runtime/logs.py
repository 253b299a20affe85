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
    """Shows this package's lines from INFO up, and only warnings of libraries, which report every file they touch."""
    logging.set_verbosity(logging.INFO)

    def keep(line: std_logging.LogRecord) -> bool:
        own = os.path.abspath(line.pathname).startswith(_PACKAGE)
        if not own:
            line.exc_info = None  # the package itself says in one line what an error means for the run
        return line.levelno > std_logging.INFO or own

    logging.get_absl_handler().addFilter(keep)
    std_logging.raiseExceptions = False  # if a log cannot be written (full disk), nothing more is said

    def note(ended: threading.ExceptHookArgs) -> None:
        logging.error("%s: %s", ended.thread and ended.thread.name, ended.exc_value)

    threading.excepthook = note

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, error, trace)
        else:  # a thread of a library, whose error is raised again where its result is awaited
            logging.debug("%s", error)

    sys.excepthook = show


@contextlib.contextmanager
def host_log(workdir: str | os.PathLike[str], process_index: int) -> Iterator[None]:
    """Writes what is logged inside the block to `workdir/logs/host_NNN.log` too, and the error that ends the block."""
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
