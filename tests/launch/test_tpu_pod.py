"""tpu_pod.sh, and through it what tpu_worker.sh does on every worker."""

import contextlib
import json
import os
import re
import signal
import sys

import pytest

from tests.helpers.slow_cases import slow
from tests.helpers.stand_ins import GCLOUD, SECONDS, UV, WORKER_PROGRAM, put, run, running, wait_for

SLICE = ["--name=pod", "--zone=z"]
RUN = ["run", *SLICE, "--type=v5litepod-16", "--", "--config=c", "--workdir=gs://bucket/a run", "--note=it's"]


@pytest.fixture
def cloud(tmp_path):
    """The environment in which gcloud, uv and gcsfuse are stand-ins; RUN's slice is made on request."""
    note = '#!/usr/bin/env bash\necho "$(basename "$HOME") $*" >>"$CLOUD/mounted"\n'
    programs = put(tmp_path / "bin", gcloud=GCLOUD.format(python=sys.executable), uv=UV, gcsfuse=note)
    put(tmp_path, program=WORKER_PROGRAM)
    yield {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CLOUD": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "POLL": "0.05",
        "GRACE": "1",
        "CODES": "0",
    }
    for pid in tmp_path.glob("workers/*/.fvq_jax/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def calls(folder, verb):
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [call for call in map(json.loads, lines) if verb in call[:4]]


def attempts(folder):
    return {path.name.removeprefix("attempts-"): int(path.read_text()) for path in folder.glob("attempts-*")}


def test_pod_runs_the_same_command_on_every_worker(cloud, tmp_path):
    result = run("tpu_pod.sh", *RUN, **cloud)
    assert result.returncode == 0, result.stderr
    assert "attempt 0 ends with 0" in result.stdout
    assert attempts(tmp_path) == {"0_0": 1, "0_1": 1}
    for worker in ("0_0", "0_1"):
        folder = f"{tmp_path}/workers/{worker}/gcs/bucket"
        line = f"{worker} -m fvq_jax.main --distributed --config=c --workdir={folder}/a run --note=it's\n"
        assert line in (tmp_path / "started").read_text()
        assert re.search(
            f"^{worker} .*--metadata-cache-ttl-secs=0 .*bucket {folder}$", (tmp_path / "mounted").read_text(), re.M
        )
        assert (tmp_path / "workers" / worker / "fvq_jax" / "fvq_jax" / "main.py").exists()
    assert (tmp_path / "installed").read_text().count("-r requirements.txt jax[tpu]") == 2
    (create,) = calls(tmp_path, "create")
    assert create[4:] == [
        "pod",
        "--zone=z",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=pod",
    ]
    assert not calls(tmp_path, "delete")
    for call in calls(tmp_path, "ssh"):  # a machine that is gone does not end a connection, nor refuse a new one
        if "tpu_worker.sh install" not in call[-1]:
            assert {"--ssh-flag=-oServerAliveInterval=15", "--ssh-flag=-oConnectTimeout=15"} < set(call)


@pytest.mark.parametrize("lost", ["node", *slow("SUSPENDED", "FAILED")])
def test_pod_is_made_again_after_a_preemption_until_the_run_is_done(cloud, tmp_path, lost):
    """First the slice goes, then the new one's program is interrupted, then it reaches its last step."""
    result = run("tpu_pod.sh", *RUN, **cloud | {"LOST": lost, "CODES": "wait 75 0"})
    assert result.returncode == 0, result.stderr
    verbs = [call[3] for call in calls(tmp_path, "queued-resources") if call[3] in ("create", "delete")]
    assert verbs == ["create", "delete", "create"]
    assert attempts(tmp_path) == {"0_0": 3, "0_1": 3}


def test_pod_options(cloud, tmp_path):
    options = [
        "--spot",
        "--slices=2",
        "--project=p",
        "--version=v",
        "--create=--network=n",
        "--ssh=--tunnel-through-iap",
    ]
    result = run("tpu_pod.sh", RUN[0], *options, *RUN[1:], **cloud)
    assert result.returncode == 0, result.stderr
    assert attempts(tmp_path) == {"0_0": 1, "0_1": 1, "1_0": 1, "1_1": 1}
    (create,) = calls(tmp_path, "create")
    for option in ("--spot", "--node-count=2", "--node-prefix=pod", "--runtime-version=v", "--network=n"):
        assert option in create
    assert all("--project=p" in call for call in calls(tmp_path, "compute"))
    assert all("--tunnel-through-iap" in call for call in calls(tmp_path, "ssh") + calls(tmp_path, "scp"))


@pytest.mark.parametrize(
    ("codes", "code", "tries"),
    [("2", 2, 1), ("1", 1, 2), ("1 75 1 0", 0, 4)],
    ids=["bad input", "fails", "recovers"],
)
def test_pod_retries(cloud, tmp_path, codes, code, tries):
    result = run("tpu_pod.sh", RUN[0], "--retries=1", *RUN[1:], **cloud | {"CODES": codes})
    assert result.returncode == code, result.stderr
    assert attempts(tmp_path) == {"0_0": tries, "0_1": tries}
    assert len(calls(tmp_path, "create")) == 1
    assert len(calls(tmp_path, "scp")) == 1


def test_pod_ends_workers_that_hang_when_another_has_failed(cloud, tmp_path):
    result = run("tpu_pod.sh", *RUN, **cloud | {"CODES_0_0": "1 0", "CODES_0_1": "deaf 0"})
    assert result.returncode == 0, result.stderr
    assert attempts(tmp_path) == {"0_0": 2, "0_1": 2}


def test_pod_run_takes_up_what_runs_and_stop_saves_it(cloud, tmp_path):
    cloud["CODES"] = "wait"
    started = [tmp_path / "attempts-0_0", tmp_path / "attempts-0_1"]
    with running("tpu_pod.sh", *RUN, **cloud) as process:
        wait_for(*started, *tmp_path.glob("workers/*/.fvq_jax/pid"))
        process.kill()
    other = run("tpu_pod.sh", *RUN, "--config.seed=1", **cloud)
    assert other.returncode == 2
    assert "another run is in progress" in other.stderr
    with running("tpu_pod.sh", *RUN, **cloud) as process:
        assert "the program runs" in process.stderr.readline()
        status = run("tpu_pod.sh", "status", *SLICE, **cloud).stdout
        assert status.startswith("pod ACTIVE\n")
        assert status.count(" running\n") == 2
        stopped = run("tpu_pod.sh", "stop", *SLICE, **cloud).stdout
        assert stopped.count(" stopped 75\n") == 2
        assert process.wait(SECONDS) == 75
    assert attempts(tmp_path) == {"0_0": 1, "0_1": 1}
    assert "attempt 0 ends with wait" in run("tpu_pod.sh", "logs", *SLICE, **cloud).stdout
    assert len(calls(tmp_path, "create")) == 1


def test_pod_create_and_delete_can_be_repeated(cloud, tmp_path):
    for _ in range(2):
        assert run("tpu_pod.sh", "create", *SLICE, "--type=v6e-16", **cloud).returncode == 0
    (create,) = calls(tmp_path, "create")
    assert "--runtime-version=v2-alpha-tpuv6e" in create
    for _ in range(2):
        assert run("tpu_pod.sh", "delete", *SLICE, **cloud).returncode == 0
    assert [call[4:] for call in calls(tmp_path, "delete")] == [["pod", "--zone=z", "--force", "--quiet"]]


def test_pod_gives_up_where_no_slice_can_be_made(cloud, tmp_path):
    (tmp_path / "no_quota").touch()
    result = run("tpu_pod.sh", RUN[0], "--retries=1", *RUN[1:], **cloud)
    assert result.returncode == 1
    assert len(calls(tmp_path, "create")) == 2


@pytest.mark.parametrize("subcommand", ["run", "status"])
def test_pod_ends_at_once_where_gcloud_refuses(cloud, tmp_path, subcommand):
    """No project, no login, an API that is not enabled: gcloud says what, and waiting is no use."""
    flags = RUN[3:] if subcommand == "run" else []
    result = run("tpu_pod.sh", subcommand, *SLICE, *flags, **cloud | {"SILENT": "1", "POLL": "1000"})
    assert result.returncode == 1
    assert result.stderr.splitlines()[0] == "ERROR: no answer"
    assert len(result.stderr.splitlines()) == 2
    assert len(calls(tmp_path, "list")) == 1


def test_pod_bears_with_google_cloud_once_it_has_answered(cloud, tmp_path):
    result = run("tpu_pod.sh", *RUN, **cloud | {"SILENT": "2 3 6"})
    assert result.returncode == 0, result.stderr
    assert attempts(tmp_path) == {"0_0": 1, "0_1": 1}


@pytest.mark.parametrize("subcommand", ["run", "create", "logs", "status", "stop", "delete"])
def test_pod_dry_run_prints_gcloud_commands_and_runs_none(cloud, tmp_path, subcommand):
    flags = RUN[RUN.index("--") :] if subcommand == "run" else []
    result = run("tpu_pod.sh", subcommand, *SLICE, "--type=v5p-64", "--dry-run", *flags, **cloud)
    assert result.returncode == 0
    assert not (tmp_path / "calls").exists()
    commands = [line for line in result.stdout.splitlines() if line.startswith("gcloud compute tpus")]
    assert commands
    if subcommand == "run":
        verbs = [line.split()[4] for line in commands if line.split()[3] == "queued-resources"]
        assert verbs == ["list", "create", "list", "scp", "ssh", "ssh", "ssh", "list", "ssh"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["start", *SLICE],
        ["create", *SLICE],  # no type
        ["create", "--zone=z", "--type=v5p-64"],
        ["create", "--name=pod", "--type=v5p-64"],
        ["create", *SLICE, "--type=v9-64"],
        ["create", *SLICE, "--type=v5p-64", "--slices=0"],
        ["create", *SLICE, "--type=v5p-64", "--preemptible"],
        ["run", *SLICE, "--type=v5p-64", "--", "--config=c"],
    ],
    ids=" ".join,
)
def test_pod_refuses(cloud, tmp_path, arguments):
    result = run("tpu_pod.sh", *arguments, **cloud)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "calls").exists()


def test_pod_starts_another_program_which_needs_no_config(cloud):
    result = run("tpu_pod.sh", "run", *SLICE, "--type=v5p-64", "--dry-run", "--", "sample", "--out=o", **cloud)
    assert result.returncode == 0
    assert "start sample --out=o" in result.stdout.replace("\\", "")
