"""tpu_worker.sh called by hand. What it does for tpu_pod.sh is in test_tpu_pod.py."""

import os

from tests.helpers.stand_ins import put, run


def test_a_dry_run_prints_what_it_would_do(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    programs = put(tmp_path / "bin", gcsfuse="")  # installed, so that it is not installed first
    worker = {"HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}"}
    started = run("tpu_worker.sh", "--dry-run", "start", "--workdir=gs://bucket/run", **worker).stdout.splitlines()
    assert [line.split()[0] for line in started] == ["mkdir", "gcsfuse", ".venv/bin/python"]
    assert started[-1].split()[-1] == f"--workdir={home}/gcs/bucket/run"
    assert run("tpu_worker.sh", "--dry-run", "stop", **worker).stdout.startswith("kill -TERM ")
    assert not list(home.iterdir())


def test_an_unknown_command_is_refused(tmp_path):
    result = run("tpu_worker.sh", "halt", HOME=str(tmp_path))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_starts_another_program_with_its_command_first(tmp_path):
    programs = put(tmp_path / "bin", gcsfuse="")
    worker = {"HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}"}
    flags = ["tokenize", "extract", "--out=gs://bucket/codes"]
    started = run("tpu_worker.sh", "--dry-run", "start", *flags, **worker).stdout.splitlines()[-1].split()
    out = f"--out={tmp_path}/gcs/bucket/codes"
    assert started == [".venv/bin/python", "-m", "fvq_jax.tokenize", "extract", out, "--distributed"]
