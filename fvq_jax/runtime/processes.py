"""Becoming one of several processes of a run, on one machine or on many."""

import dataclasses
import os
import sys
import threading

import jax

from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.exits import FAILED, fail

TIMEOUT = 120  # seconds
_MOST = 10_000_000  # processes or seconds: more could only be a mistake, and JAX does not take every number
# What the command-line options mean that make a program one of several processes.
OPTIONS = {
    "distributed": "Run as one of several processes: TPU pods and Slurm are detected, elsewhere give --coordinator, "
    "--num_processes and --process_id, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    "coordinator": "HOST:PORT of process 0; the port must be free there",
    "num_processes": "How many processes there are",
    "process_id": "Number of this process, from 0",
    "distributed_timeout": "Seconds to wait for all processes at the start, and for one that fell silent",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of several processes this is, and where they meet.

    A value that is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID; if that is not set
    either, it is detected on TPU pods and in Slurm.

    Attributes:
      timeout: seconds to wait for all processes at the start; later, if one is silent for so long, all of them end.
      coordinator: HOST:PORT of the first process.
      count: how many processes there are.
      index: which of them this is, from 0.
    """

    timeout: int = TIMEOUT
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    @classmethod
    def of(
        cls, distributed: bool, timeout: int, coordinator: str | None, count: int | None, index: int | None
    ) -> "Place | None":
        """The place that the options of a command line give; None for a single process.

        InputError for numbers that cannot be, and for a place without `--distributed`.
        """
        place = cls(timeout, coordinator, count, index)
        for name, value, least in (
            ("distributed_timeout", place.timeout, 1),
            ("num_processes", place.count, 1),
            ("process_id", place.index, 0),
        ):
            require(value is None or least <= value <= _MOST, f"--{name} must be {least} to {_MOST:,}, not {value}")
        require(
            count is None or index is None or index < count,
            f"--process_id={index} is none of the {count} processes: they are numbered from 0",
        )
        require(
            distributed or (coordinator, count, index) == (None, None, None),
            "--coordinator, --num_processes and --process_id do nothing without --distributed",
        )
        return place if distributed else None

    def join(self) -> None:
        """Joins the other processes; returns when all have come.

        Ends this process with one line if some are missing after `timeout` seconds. SystemExit if the network fails,
        InputError if the settings are wrong.
        """
        coordinator = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        count = os.environ.get("JAX_NUM_PROCESSES") if self.count is None else self.count
        index = os.environ.get("JAX_PROCESS_ID") if self.index is None else self.index
        complete = None not in (coordinator, count, index)

        def give_up() -> None:
            who = f"this is process {index} of {count}, coordinator {coordinator}; " if complete else ""
            fail(
                f"--distributed: after {self.timeout} s not all processes have come: {who}"
                "is every host up, and started with the same command?"
            )
            os._exit(FAILED)

        # At its own timeout JAX would end the process with a stack trace.
        alarm = threading.Timer(self.timeout, give_up)
        alarm.daemon = True
        alarm.start()
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes=None if count is None else int(count),
                process_id=None if index is None else int(index),
                # In Kubernetes, JAX's detection would warn of a missing package.
                cluster_detection_method="deactivate" if complete else None,
                initialization_timeout=self.timeout + 60,
                heartbeat_timeout_seconds=max(1, self.timeout * 3 // 4),  # the rest is time for ending
            )
        except ValueError as error:
            raise InputError(f"--distributed: cannot join the other processes: {error}") from error
        except RuntimeError as error:  # an error of the network: the next try may succeed
            sys.exit(fail(f"--distributed: cannot join the other processes: {error}", FAILED))
        finally:
            alarm.cancel()
