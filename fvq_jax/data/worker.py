"""What every worker process of this package does first."""

import multiprocessing
import os
import signal
import threading


def follow_parent(*_: int) -> None:
    """Lets a worker process end when the main process does, and not before. Grain passes arguments; they are unused.

    Schedulers send SIGTERM, and terminals SIGINT, to every process of a job; the main one still needs the others
    until it has saved its work. If it is killed instead, no one would stop the workers.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
