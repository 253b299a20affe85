import importlib.util
import os
import subprocess
import sys

import pytest

from fvq_jax.runtime.libtpu import NO_TPU, say_that_there_is_none

PROGRAM = "import jax; from fvq_jax.runtime import exits; exits.run(lambda: print(jax.devices()[0].platform))"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.skipif(os.environ.get("TPU_SKIP_MDS_QUERY") != "1", reason="this machine has a TPU")
def test_a_program_writes_no_errors_because_libtpu_is_installed():
    without = ("JAX_PLATFORMS", "XLA_FLAGS", *NO_TPU)
    environment = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("cpu", "")


def test_where_there_may_be_a_tpu_it_is_told_nothing(monkeypatch):
    for name in ("JAX_FORCE_TPU_INIT", *NO_TPU):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with monkeypatch.context() as forced:
        forced.setenv("JAX_FORCE_TPU_INIT", "1")
        say_that_there_is_none()
    with monkeypatch.context() as found:
        found.delenv("TPU_SKIP_MDS_QUERY")
        say_that_there_is_none()
    assert not set(NO_TPU) & set(os.environ)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "")  # so that it is taken away again
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    say_that_there_is_none()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert os.environ["TPU_ACCELERATOR_TYPE"] == NO_TPU["TPU_ACCELERATOR_TYPE"]
