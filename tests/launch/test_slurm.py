import os
import re
import time

import pytest

from tests.helpers.stand_ins import LAUNCH, ROOT, SECONDS, SRUN, put, run, running, wait_for

FLAGS = ["--config=configs/fvq262k.py", "--workdir=/shared/run"]


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job's shell, with stand-ins for Slurm's commands."""
    note = '#!/usr/bin/env bash\necho "$*" >>"$RECORD/scontrol"\n'
    programs = put(tmp_path / "bin", srun=SRUN, squeue='#!/usr/bin/env bash\necho "$STATE"\n', scontrol=note)
    path = f"{programs}:{os.environ['PATH']}"
    return {"PATH": path, "RECORD": str(tmp_path), "SLURM_JOB_ID": "17", "STATE": "RUNNING"}


def test_slurm_starts_the_program_on_every_task(slurm, tmp_path):
    slurm |= {"PYTHON": "python", "SLURM_CPUS_PER_TASK": "3"}
    assert run("slurm.sbatch", *FLAGS, **slurm).returncode == 0
    given = (tmp_path / "srun").read_text().split()
    assert given[-6:] == ["python", "-m", "fvq_jax.main", "--distributed", *FLAGS]
    assert "--kill-on-bad-exit=0" in given
    assert "--cpus-per-task=3" in given  # srun does not take it over from the job: a single core would be left
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_slurm_requeues_what_was_interrupted_and_nothing_else(slurm, tmp_path, code, state, requeued):
    result = run("slurm.sbatch", *FLAGS, **slurm | {"CODE": str(code), "STATE": state})
    assert result.returncode == code
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


def test_slurm_outlives_the_signal_that_its_tasks_get(slurm, tmp_path):
    with running("slurm.sbatch", *FLAGS, **slurm | {"CODE": "75", "SAVES": "1"}) as process:
        wait_for(tmp_path / "srun")
        process.terminate()
        time.sleep(0.2)
        (tmp_path / "told").touch()
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 75
    assert out.startswith("saved\n")
    assert (tmp_path / "scontrol").exists()


def test_slurm_dry_run(slurm, tmp_path):
    result = run("slurm.sbatch", "--dry-run", *FLAGS, **slurm)
    assert result.returncode == 0
    commands = [line.split() for line in result.stdout.splitlines() if line[0] != "#"]
    assert [command[0] for command in commands] == ["srun", "squeue", "scontrol"]
    assert f"--cpus-per-task={asked()['cpus-per-task']}" in commands[0]
    assert not (tmp_path / "srun").exists()


def asked():
    """What the script asks sbatch for."""
    options = re.findall(r"^#SBATCH --(\S+)", (LAUNCH / "slurm.sbatch").read_text(), flags=re.MULTILINE)
    return dict(option.partition("=")[::2] for option in options)


def test_slurm_asks_for_what_saving_in_time_needs():
    options = asked()
    assert "requeue" in options
    assert options["signal"] == "TERM@120"
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_slurm_refuses(slurm, tmp_path):
    for arguments, cwd in (([], ROOT), (FLAGS[:1], ROOT), (FLAGS, tmp_path)):
        result = run("slurm.sbatch", *arguments, cwd=cwd, **slurm)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1


def test_slurm_starts_another_program_and_its_command_comes_first(slurm, tmp_path):
    given = ["extract", "--tokenizer=t", "--out=o"]
    assert run("slurm.sbatch", "tokenize", *given, PYTHON="python", **slurm).returncode == 0
    started = (tmp_path / "srun").read_text().split()
    assert started[-7:] == ["python", "-m", "fvq_jax.tokenize", *given, "--distributed"]
