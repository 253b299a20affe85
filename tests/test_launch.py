"""The scripts of launch/, run with stand-ins for everything they start: the program, Slurm and Google Cloud."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from configs import fvq262k
from fvq_jax.config import flatten, validate

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GUIDE = (ROOT / "docs" / "launch.md").read_text()
SCRIPTS = ["local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"]
SECONDS = 300  # after which a script that hangs is ended

# Stands for Python. Notes what it was given, then does what PLAN_<process> says.
PROGRAM = """#!/usr/bin/env bash
note=$RECORD/$JAX_PROCESS_ID
env >"$note.environment"
echo "$*" >"$note.arguments"
plan=PLAN_$JAX_PROCESS_ID
echo "$JAX_PROCESS_ID does ${!plan}"
case ${!plan} in
  wait) trap 'echo TERM >"$note.signal"; exit 75' TERM ;;
  deaf) trap 'echo TERM >"$note.signal"' TERM ;;
  save) for i in 1 2 3 4 5; do sleep 0.1; done && exit 75 ;;
  *) exit "${!plan}" ;;
esac
touch "$note.ready"
while :; do sleep 0.1; done
"""

# Stands for srun and keeps the exit code it was told; squeue says STATE; scontrol only notes.
SRUN = """#!/usr/bin/env bash
echo "$*" >"$RECORD/srun"
if [[ ${SAVES:-} ]]; then until [[ -e $RECORD/told ]]; do sleep 0.05; done; echo saved; fi
exit "${CODE:-0}"
"""

# Stands for the program on a TPU worker: the n-th attempt does the n-th word of CODES, the last again and again.
WORKER_PROGRAM = """#!/usr/bin/env bash
worker=$(basename "$HOME") attempts=$CLOUD/attempts-$(basename "$HOME")
n=$(cat "$attempts" 2>/dev/null || echo 0)
echo $((n + 1)) >"$attempts"
echo "$worker $*" >>"$CLOUD/started"
own=CODES_$worker
codes=(${!own:-$CODES})
((n < ${#codes[@]})) || n=$((${#codes[@]} - 1))
echo "attempt $n ends with ${codes[n]}"
case ${codes[n]} in
  wait) trap 'exit 75' TERM ;;
  deaf) trap '' TERM ;;
  *) exit "${codes[n]}" ;;
esac
while :; do sleep 0.1; done
"""

UV = """#!/usr/bin/env bash
echo "uv $*" >>"$CLOUD/installed"
if [[ $1 == venv ]]; then mkdir -p .venv/bin && ln -sf "$CLOUD/program" .venv/bin/python; fi
"""

# Two workers to a slice, each a folder that is its home. LOST: what becomes of the first slice while its log is read.
GCLOUD = """#!{python} -IS
import json, os, pathlib, signal, sys, time

cloud = pathlib.Path(os.environ["CLOUD"])
state, workers, calls = cloud / "state", cloud / "workers", cloud / "calls"
arguments = sys.argv[1:]
with calls.open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
kind, verb = arguments[2:4]
options = dict(argument[2:].split("=", 1) for argument in arguments if argument[:2] == "--" and "=" in argument)
created = calls.read_text().count('"queued-resources", "create"')

def end_programs():
    for pid in workers.glob("*/.fvq_jax/pid"):
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass

if kind == "tpu-vm":
    print("PREEMPTED" if (cloud / "node_lost").exists() else "READY")
elif verb == "create":
    if (cloud / "no_quota").exists():
        sys.exit("no quota")
    assert not state.exists()
    for slice_number in range(int(options.get("node-count", 1))):
        for worker in range(2):
            (workers / f"{{slice_number}}_{{worker}}").mkdir(parents=True)
    state.write_text("WAITING_FOR_RESOURCES")
elif verb == "list":
    if state.exists():
        print(state.read_text())
        if state.read_text() == "WAITING_FOR_RESOURCES":
            state.write_text("ACTIVE")
elif verb == "delete":
    end_programs()
    (cloud / "node_lost").unlink(missing_ok=True)
    import shutil

    shutil.rmtree(workers)
    state.unlink()
else:
    slices = "*" if options["node"] == "all" else options["node"]
    homes = sorted(workers.glob(slices + "_" + ("*" if options["worker"] == "all" else options["worker"])))
    if verb == "scp":
        for home in homes:
            (home / arguments[5].split(":")[1]).write_bytes(pathlib.Path(arguments[4]).read_bytes())
        sys.exit()
    if options["command"].endswith(" log") and os.environ.get("LOST") and created == 1:
        while len((cloud / "started").read_text().splitlines()) < len(list(workers.iterdir())):
            time.sleep(0.05)
        end_programs()
        if os.environ["LOST"] == "node":
            (cloud / "node_lost").touch()
        else:
            state.write_text(os.environ["LOST"])
        sys.exit(255)
    import subprocess  # here, since it takes as long as all the rest

    codes = [
        subprocess.run(["bash", "-c", options["command"]], cwd=home, env=dict(os.environ, HOME=str(home))).returncode
        for home in homes
    ]
    sys.exit(max(codes))
"""


def put(folder, **programs):
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def wait_for(*paths):
    deadline = time.monotonic() + SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def run(script, *arguments, cwd=ROOT, **environment):
    command = ["bash", LAUNCH / script, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=SECONDS
    )


@contextlib.contextmanager
def running(script, *arguments, **environment):
    command = ["bash", LAUNCH / script, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, stdout=-1, stderr=-1) as process:
        try:
            yield process
        finally:
            process.kill()


# All scripts


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


# local.sh


@pytest.fixture
def local(tmp_path):
    """The environment in which the stand-in is the program."""
    put(tmp_path, python=PROGRAM)
    return {"PYTHON": str(tmp_path / "python"), "RECORD": str(tmp_path), "PORT": "1234"}


def environment_of(folder, process):
    lines = (folder / f"{process}.environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_local_dry_run_prints_every_command_and_starts_none(local, tmp_path):
    result = run("local.sh", "--dry-run", "--devices=4", "3", "configs/fvq16k.py:smoke", "--config.seed=1", **local)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 3
    for i, line in enumerate(result.stdout.splitlines()):
        for part in (f"JAX_PROCESS_ID={i}", "JAX_NUM_PROCESSES=3", "JAX_NUM_CPU_DEVICES=4", "--config.seed=1"):
            assert part in line.split()
    assert not list(tmp_path.glob("*.arguments"))


def test_local_starts_processes_on_simulated_devices(local, tmp_path):
    result = run(
        "local.sh", "--devices=4", "2", "configs/x.py:smoke", "--config.seed=1", PLAN_0="0", PLAN_1="0", **local
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "0 does 0\n"
    for i in range(2):
        given = environment_of(tmp_path, i)
        assert given["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:1234"
        assert (given["JAX_NUM_PROCESSES"], given["JAX_PROCESS_ID"]) == ("2", str(i))
        assert (given["JAX_PLATFORMS"], given["JAX_NUM_CPU_DEVICES"], given["XLA_FLAGS"]) == ("cpu", "4", "")
        assert "JAX_LOCAL_DEVICE_IDS" not in given
        arguments = (tmp_path / f"{i}.arguments").read_text().split()
        assert arguments[:3] == ["-m", "fvq_jax.main", "--distributed"]
        assert arguments[3:] == ["--config=configs/x.py:smoke", "--config.seed=1", "--workdir=runs/local-x-smoke"]


def test_local_gives_each_process_a_gpu_and_keeps_the_workdir(local, tmp_path):
    local |= {"PLAN_0": "0", "PLAN_1": "0"}
    assert run("local.sh", "2", "configs/x.py", "--workdir=elsewhere", **local).returncode == 0
    for i in range(2):
        given = environment_of(tmp_path, i)
        assert given["JAX_LOCAL_DEVICE_IDS"] == str(i)
        assert "JAX_NUM_CPU_DEVICES" not in given
        assert (tmp_path / f"{i}.arguments").read_text().split()[-1] == "--workdir=elsewhere"


def test_local_stops_the_others_when_one_fails(local, tmp_path):
    result = run("local.sh", "3", "c", PLAN_0="wait", PLAN_1="3", PLAN_2="wait", **local)
    assert result.returncode == 3
    assert "process 1 ended with 3: 1 does 3" in result.stderr


def test_local_kills_what_does_not_stop(local, tmp_path):
    result = run("local.sh", "2", "c", PLAN_0="deaf", PLAN_1="1", GRACE="1", **local)
    assert result.returncode == 1


def test_local_lets_the_others_save(local, tmp_path):
    result = run("local.sh", "2", "c", PLAN_0="save", PLAN_1="75", **local)
    assert result.returncode == 75
    assert not (tmp_path / "0.signal").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(local, tmp_path, number):
    with running("local.sh", "2", "c", PLAN_0="wait", PLAN_1="wait", **local) as process:
        wait_for(tmp_path / "0.ready", tmp_path / "1.ready")
        process.send_signal(number)
        assert process.wait(SECONDS) == 75
    assert (tmp_path / "0.signal").exists()
    assert (tmp_path / "1.signal").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["2"], ["0", "c"], ["two", "c"], ["--devices=0", "2", "c"], ["--gpus", "2", "c"]]
)
def test_local_refuses(arguments):
    result = run("local.sh", *arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


# slurm.sbatch


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job's shell, with stand-ins for Slurm's commands."""
    note = '#!/usr/bin/env bash\necho "$*" >>"$RECORD/scontrol"\n'
    programs = put(tmp_path / "bin", srun=SRUN, squeue='#!/usr/bin/env bash\necho "$STATE"\n', scontrol=note)
    path = f"{programs}:{os.environ['PATH']}"
    return {"PATH": path, "RECORD": str(tmp_path), "SLURM_JOB_ID": "17", "STATE": "RUNNING"}


FLAGS = ["--config=configs/fvq262k.py", "--workdir=/shared/run"]


def test_slurm_starts_the_program_on_every_task(slurm, tmp_path):
    assert run("slurm.sbatch", *FLAGS, PYTHON="python", **slurm).returncode == 0
    given = (tmp_path / "srun").read_text().split()
    assert given[-6:] == ["python", "-m", "fvq_jax.main", "--distributed", *FLAGS]
    assert "--kill-on-bad-exit=0" in given
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
    assert [line.split()[0] for line in result.stdout.splitlines() if line[0] != "#"] == ["srun", "squeue", "scontrol"]
    assert not (tmp_path / "srun").exists()


def test_slurm_asks_for_what_saving_in_time_needs():
    asked = re.findall(r"^#SBATCH --(\S+)", (LAUNCH / "slurm.sbatch").read_text(), flags=re.MULTILINE)
    options = dict(option.partition("=")[::2] for option in asked)
    assert "requeue" in options
    assert options["signal"] == "TERM@120"
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_slurm_refuses(slurm, tmp_path):
    for arguments, cwd in (([], ROOT), (FLAGS[:1], ROOT), (FLAGS, tmp_path)):
        result = run("slurm.sbatch", *arguments, cwd=cwd, **slurm)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1


# tpu_pod.sh and tpu_worker.sh

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


@pytest.mark.parametrize("lost", ["SUSPENDED", "FAILED", "node"])
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


def test_worker_dry_run_prints_what_it_would_do(cloud, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    cloud["HOME"] = str(home)
    started = run("tpu_worker.sh", "--dry-run", "start", "--workdir=gs://bucket/run", **cloud).stdout.splitlines()
    assert [line.split()[0] for line in started] == ["mkdir", "gcsfuse", ".venv/bin/python"]
    assert started[-1].split()[-1] == f"--workdir={home}/gcs/bucket/run"
    assert run("tpu_worker.sh", "--dry-run", "stop", **cloud).stdout.startswith("kill -TERM ")
    assert not list(home.iterdir())


# k8s.yaml and Dockerfile


@pytest.fixture(scope="module")
def kubernetes():
    """{(kind, accelerator): object}."""
    objects = list(yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text()))
    named = {(item["kind"], item["metadata"]["labels"]["accelerator"]): item for item in objects}
    assert len(named) == len(objects) == 4
    return named


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_kubernetes_job_is_one_run(kubernetes, accelerator):
    service, job = kubernetes["Service", accelerator], kubernetes["Job", accelerator]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item for item in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["parallelism"]) == str(spec["completions"]) == environment["JAX_NUM_PROCESSES"]["value"]
    index = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"

    name, domain = job["metadata"]["name"], service["metadata"]["name"]
    host, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-0.{domain}"
    assert int(port) in [item["containerPort"] for item in container["ports"]]
    assert pod["subdomain"] == domain
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": name},  # a label that the Job puts on its pods
    }
    assert {item["name"] for item in container["volumeMounts"]} == {item["name"] for item in pod["volumes"]}


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_kubernetes_reads_the_exit_codes(kubernetes, accelerator):
    spec = kubernetes["Job", accelerator]["spec"]
    pod = spec["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    by_code = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
    assert by_code == {2: "FailJob", 75: "Ignore"}
    assert all(
        rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"] for rule in rules if "onExitCodes" in rule
    )
    (disrupted,) = [rule for rule in rules if "onPodConditions" in rule]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] == 120
    assert spec["podReplacementPolicy"] == "Failed"
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (3, 0)


@pytest.mark.parametrize(
    ("accelerator", "resource", "per_node"), [("gpu", "nvidia.com/gpu", 8), ("tpu", "google.com/tpu", 4)]
)
def test_kubernetes_asks_for_devices_that_the_config_can_use(kubernetes, accelerator, resource, per_node):
    spec = kubernetes["Job", accelerator]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {resource: per_node}
    devices = per_node * spec["completions"]
    if accelerator == "tpu":
        assert spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
        assert devices == 16 * 16
    check_flags(container["args"][1:], devices)


def test_the_job_of_the_guide_can_work():
    """docs/launch.md, step 5: on 256 chips, with a discriminator that acts."""
    (flags,) = re.findall(r"launch/tpu_pod.sh run .*--type=v5litepod-256.* -- (.*?)\n\n", GUIDE, flags=re.DOTALL)
    config = check_flags(flags.replace("\\\n", " ").split(), 256)
    assert config.adversarial.start < config.epochs * 1281167 / config.batch_size / 10


def check_flags(flags, devices):
    """Applies the flags of a command line to the config they name, and checks it; returns the config."""
    values = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert {"config", "workdir"} < values.keys()
    path, _, argument = values["config"].partition(":")
    assert path == "configs/fvq262k.py"
    config = fvq262k.get_config(argument)
    for name in values:
        if name.startswith("config."):
            field = name.removeprefix("config.")
            config.update_from_flattened_dict({field: type(flatten(config)[field])(values[name])})
    validate(config, devices)
    return config


def test_the_container_is_made_of_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert (ROOT / line.split()[1]).exists(), line
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT ")]
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["python", "-m", "fvq_jax.main"]
