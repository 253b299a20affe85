"""How the scripts of launch/ are run in tests, and what stands in for everything that they start."""

import contextlib
import os
import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
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
# SILENT: which requests for the list of slices are not answered, by their numbers.
GCLOUD = """#!{python} -IS
import json, os, pathlib, re, signal, sys, time

cloud = pathlib.Path(os.environ["CLOUD"])
state, workers, calls = cloud / "state", cloud / "workers", cloud / "calls"
arguments = sys.argv[1:]
with calls.open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
kind, verb = arguments[2:4]
options = dict(argument[2:].split("=", 1) for argument in arguments if argument[:2] == "--" and "=" in argument)
created, listed = (calls.read_text().count(f'"queued-resources", "{{what}}"') for what in ("create", "list"))

def show(field, slices):
    # As gcloud, which knows full names and takes parentheses in a filter as its own.
    wanted = re.fullmatch(field + r"~([^()\\s]+)", options["filter"])
    if not wanted:
        sys.exit("ERROR: Term operand expected")
    for name, text in slices.items():
        if re.search(wanted[1], "projects/p/locations/z/queuedResources/" + name):
            print(text)

def end_programs():
    for pid in workers.glob("*/.fvq_jax/pid"):
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass

if kind == "tpu-vm":
    lost = (cloud / "node_lost").exists()
    show("queuedResource", {{"my-pod": "PREEMPTED", "pod": "PREEMPTED" if lost else "READY", "pod2": "PREEMPTED"}})
elif verb == "create":
    if (cloud / "no_quota").exists():
        sys.exit("no quota")
    assert not state.exists()
    for slice_number in range(int(options.get("node-count", 1))):
        for worker in range(2):
            (workers / f"{{slice_number}}_{{worker}}").mkdir(parents=True)
    state.write_text("WAITING_FOR_RESOURCES")
elif verb == "list":
    if str(listed) in os.environ.get("SILENT", "").split():
        sys.exit("ERROR: no answer")
    others = {{"my-pod": "FAILED", "pod2": "FAILED"}}
    show("name", others | ({{"pod": state.read_text()}} if state.exists() else {{}}))
    if state.exists() and state.read_text() == "WAITING_FOR_RESOURCES":
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
