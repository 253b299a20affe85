"""What libtpu is told on a machine without a TPU, where it is installed to compile for TPUs that are elsewhere."""

import os

# It asks for the kind of machine and for the names of its hosts, and writes errors if nobody says them.
NO_TPU = {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}


def say_that_there_is_none() -> None:
    """Keeps libtpu from writing lines of errors at the start of a program. Call it before JAX looks for devices.

    JAX chooses its devices as before. It says itself, when it is imported, whether this machine has TPU chips.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1" and "JAX_FORCE_TPU_INIT" not in os.environ:
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
