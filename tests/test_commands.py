"""`python -m fvq_jax` names every program of the package."""

import importlib
import subprocess
import sys

from fvq_jax.__main__ import COMMANDS
from tests.helpers.two_hosts import ROOT


def test_every_program_is_listed_with_what_it_does():
    command = [sys.executable, "-m", "fvq_jax"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    listed = {line.split()[2].removeprefix("fvq_jax."): line for line in lines[1:]}
    assert listed.keys() == COMMANDS.keys()
    for name, what in COMMANDS.items():
        assert listed[name].endswith(what)


def test_all_that_can_be_run_is_listed():
    files = [path for path in (ROOT / "fvq_jax").rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    names = {".".join(path.relative_to(ROOT / "fvq_jax").with_suffix("").parts) for path in files}
    assert {name.removesuffix(".__main__") for name in names} - {"__main__"} == COMMANDS.keys()


def test_every_program_says_what_it_is_for():
    for name in COMMANDS:
        module = importlib.import_module(f"fvq_jax.{name}" + (".__main__" if name == "sweep" else ""))
        assert f"python -m fvq_jax.{name}" in module.__doc__
