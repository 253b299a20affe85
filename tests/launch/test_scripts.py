"""What all scripts of launch/ have in common."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.helpers.stand_ins import LAUNCH, run

SCRIPTS = ["local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"]


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: it comes with the test extra where PyPI has a build of it")
    result = subprocess.run([shellcheck, *(LAUNCH / name for name in SCRIPTS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_script_is_known_here():
    assert sorted(path.name for path in LAUNCH.iterdir()) == sorted([*SCRIPTS, "Dockerfile", "README.md", "k8s.yaml"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert "--dry-run" in result.stdout
    assert os.access(LAUNCH / script, os.X_OK)
