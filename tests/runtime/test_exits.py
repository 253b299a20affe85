import pathlib
import subprocess
import sys

import pytest

FILE = pathlib.Path(__file__).parents[1] / "fvq_jax" / "last_words.py"
PROGRAM = """
import os, runpy, sys
with runpy.run_path({file!r})["last_words"]("this was the end"):
    {end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os.abort()", "os._exit(1)"])
def test_whoever_is_ended_from_outside_has_a_last_line(end):
    assert run(end).stderr.splitlines()[-1] == "this was the end"


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise ValueError"])
def test_whoever_ends_in_order_says_nothing_more(end):
    assert "this was the end" not in run(end).stderr


def run(end):
    program = PROGRAM.format(file=str(FILE), end=end)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
