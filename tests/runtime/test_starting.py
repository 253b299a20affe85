import os
import signal
import subprocess
import sys

import pytest

from fvq_jax.__main__ import COMMANDS
from fvq_jax.runtime import exits, starting
from tests.helpers.two_hosts import ROOT


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_a_program_imports_is_one_line(name, tmp_path):
    """JAX is the first of the libraries that take seconds."""
    (tmp_path / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", f"fvq_jax.{name}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "fvq_jax: interrupted by SIGINT: nothing was begun\n"


def test_whoever_only_imports_the_package_is_left_alone():
    program = "import signal, fvq_jax; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_program_that_has_begun_has_its_own_words(capsys):
    starting.guard()
    try:
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert exits.run(lambda: os.kill(os.getpid(), signal.SIGINT) or 0, kept="half of it") == 130
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err == "fvq_jax: interrupted by SIGINT: half of it\n"
