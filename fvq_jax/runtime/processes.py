"""Becoming one of several processes of a run, on one machine or on many."""

import dataclasses
import os
import sys
import threading

import jax

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.exits import FAILED, fail

TIMEOUT = 120  # seconds


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of several processes this is, and where they meet.

    What is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what is not there
    either is detected on TPU pods and under Slurm.

    Attributes:
      timeout: seconds to wait for all processes at the start; later a process that is silent so long ends them all.
      coordinator: HOST:PORT of the first process.
      count: how many processes there are.
      index: which of them this is, from 0.
    """

    timeout: int = TIMEOUT
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def join(self) -> None:
        """Waits until all processes have come.

        Ends this process with one line if they have not after `timeout` seconds. SystemExit if the network fails,
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

        # JAX itself would end the process with a stack trace.
        alarm = threading.Timer(self.timeout, give_up)
        alarm.daemon = True
        alarm.start()
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes=None if count is None else int(count),
                process_id=None if index is None else int(index),
                # In Kubernetes looking for more would warn of a missing package.
                cluster_detection_method="deactivate" if complete else None,
                initialization_timeout=self.timeout + 60,
                heartbeat_timeout_seconds=max(1, self.timeout * 3 // 4),  # and the rest of the time to end in
            )
        except ValueError as error:
            raise InputError(f"--distributed: cannot join the other processes: {error}") from error
        except RuntimeError as error:  # of the network, so the next try may succeed
            sys.exit(fail(f"--distributed: cannot join the other processes: {error}", FAILED))
        finally:
            alarm.cancel()
