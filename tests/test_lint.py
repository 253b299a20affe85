import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = str(pathlib.Path(sys.executable).parent)
RUFF, MYPY = (shutil.which(name, path=SCRIPTS) for name in ("ruff", "mypy"))


@pytest.mark.parametrize("command", [["format", "--check", "."], ["check", "."]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    assert RUFF, "ruff is part of the test extra: pip install -e .[test]"
    result = subprocess.run([RUFF, *command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_types_agree():
    assert MYPY, "mypy is part of the test extra: pip install -e .[test]"
    result = subprocess.run([MYPY], cwd=ROOT, capture_output=True, text=True)  # which files: pyproject.toml
    assert result.returncode == 0, result.stdout + result.stderr
