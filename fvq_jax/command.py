"""What the programs of this package share: exit codes, and errors as one line on standard error."""

import argparse
import os
import sys
import threading
from typing import NoReturn

import jax

from fvq_jax.errors import InputError

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


def join_processes(
    timeout: int = 120, *, coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Makes this one of several processes: number `index` of `count`, of which the first is at `coordinator` HOST:PORT.

    What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what is not there
    either is detected on TPU pods and under Slurm.

    Ends this process with one line if the others have not all come after `timeout` seconds. One that falls silent
    later, for longer than that, ends them all. SystemExit if the network fails, InputError if the settings are wrong.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = os.environ.get("JAX_NUM_PROCESSES") if count is None else count
    index = os.environ.get("JAX_PROCESS_ID") if index is None else index
    complete = None not in (coordinator, count, index)

    def give_up():
        who = f"this is process {index} of {count}, coordinator {coordinator}; " if complete else ""
        fail(
            f"--distributed: after {timeout} s not all processes have come: {who}"
            "is every host up, and started with the same command?"
        )
        os._exit(FAILED)

    # JAX itself would end the process with a stack trace.
    alarm = threading.Timer(timeout, give_up)
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
            # In Kubernetes looking for more would warn of a missing package.
            cluster_detection_method="deactivate" if complete else None,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=max(1, timeout * 3 // 4),  # and the rest of the time to end in
        )
    except ValueError as error:
        raise InputError(f"--distributed: cannot join the other processes: {error}") from error
    except RuntimeError as error:  # of the network, so the next try may do
        sys.exit(fail(f"--distributed: cannot join the other processes: {error}", FAILED))
    finally:
        alarm.cancel()


class Parser(argparse.ArgumentParser):
    """argparse, with bad arguments reported by `fail` instead of in several lines."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        sys.exit(fail(f"{message} (see python -m {self.prog} --help)"))
