import itertools
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers.program import ENVIRONMENT, ROOT, SMALLEST

# Imports what the program imports, then runs it once per line of input, each time in a process of its own.
PREPARED = """
import json, os, runpy, sys
import fvq_jax.training.loop, absl.app, ml_collections.config_flags

assert "fvq_jax.main" not in sys.modules
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in enumerate(("input", "out", "err")):
            os.dup2(os.open(job[name], os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["fvq_jax.main", *job["args"]]
        runpy.run_module("fvq_jax.main", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def start(*args):
    command = [sys.executable, "-m", "fvq_jax.main", *args]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)


def run(*args):
    process = start(*args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def run_prepared(tmp_path_factory):
    """Like `run`, without the seconds that importing takes."""
    folder = tmp_path_factory.mktemp("prepared")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", PREPARED], cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)
    runs = itertools.count()

    def run_prepared(*args):
        out, err = (folder / f"{name}{next(runs)}" for name in ("out", "err"))
        job = {"args": args, "input": os.devnull, "out": str(out), "err": str(err)}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), out.read_text(), err.read_text()

    yield run_prepared
    process.communicate(timeout=300)
    assert process.returncode == 0


def test_a_run_prints_its_result_last_and_exits_0(tmp_path):
    code, out, err = run(*SMALLEST, f"--workdir={tmp_path}")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert out.endswith("}\n")
    wanted = [
        "step",
        "psnr",
        "ssim",
        "usage",
        "perplexity",
        "codebook_size",
        "tokens",
        "images_per_second",
        "seconds",
        "workdir",
    ]
    assert set(wanted) <= result.keys()
    assert result["step"] == 6
    assert "LPIPS is not used" in err
    log = (tmp_path / "logs" / "host_000.log").read_text()
    assert re.search(r"step 6/6, loss \d+\.\d{4}, usage \d+\.\d%, images/s \d+\.\d, ETA 00:00", log), log
    assert "orbax" not in err


def test_a_cpu_counts_as_several_devices(tmp_path):
    code, _, err = run(*SMALLEST, f"--workdir={tmp_path}", "--config.mesh.cpu_devices=4")
    assert code == 0, err
    assert "4 x cpu, mesh {'data': 4, 'codebook': 1}" in err


@pytest.mark.slow
def test_sigterm_saves_says_so_and_exits_75(tmp_path):
    args = [*SMALLEST, f"--workdir={tmp_path}", "--config.steps=100000", "--config.log.every_steps=20"]
    process = start(*args)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "step 40/" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, "".join(lines) + err
    assert "SIGTERM: saved step" in err
    assert out == ""
    assert list((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--config.optim.lerning_rate=1"],
            ["unknown config field optim.lerning_rate", "did you mean optim.learning_rate?"],
        ),
        pytest.param(
            ["--config.tokenizer.brigde=x"],
            ["unknown config field tokenizer.brigde", "did you mean tokenizer.quantizer.bridge?"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config.tokenizer.bridge=none"],
            ["unknown config field tokenizer.bridge", "did you mean tokenizer.quantizer.bridge?"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--config.optim.learning_rate=fast"], ["optim.learning_rate", "fast"], marks=pytest.mark.slow),
        pytest.param(
            ["--config.tokenizer.quantizer.codebook_size=1000"],
            ["tokenizer.quantizer: codebook_size 1000", "not a square", "1d"],
            marks=pytest.mark.slow,
        ),
        (["--config.mesh.codebook=3"], ["mesh.codebook 3", "does not divide", "allowed sizes: 1, 2, 4"]),
        pytest.param(
            ["--config.data.image_size=17"],
            ["data.image_size 17", "not divisible by the down-sampling of 2", "16 or 18"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--config.tokenizer.ch=48"], ["48 channels", "32 groups"], marks=pytest.mark.slow),
        (
            ["--config.data.source=folder", "--config.data.train_dir=EMPTY", "--config.data.eval_dir=EMPTY"],
            ["EMPTY", ".jpg"],
        ),
        pytest.param(
            ["--config.loss.perceptual_weight=1.0", "--config.data.image_size=32"],
            ["LPIPS", "loss.lpips_path"],
            marks=pytest.mark.slow,
        ),
        (["--bogus"], ["bogus"]),
        pytest.param(["surplus"], ["surplus"], marks=pytest.mark.slow),
        pytest.param(["--process_id=1"], ["--process_id", "without --distributed"], marks=pytest.mark.slow),
        pytest.param(["--distributed", "--num_processes=two"], ["--num_processes", "two"], marks=pytest.mark.slow),
        pytest.param(["--profile_steps=20"], ["--profile_steps=20", "10:20"], marks=pytest.mark.slow),
        pytest.param(
            ["--config.eval.inception=EMPTY/no.pth"],
            ["eval.inception: there is no file", "EMPTY/no.pth"],
            marks=pytest.mark.slow,
        ),
        (["--config=configs/missing.py"], ["the config file configs/missing.py cannot be read", "No such file"]),
        pytest.param(
            ["--config=configs/fvq16k.py:smoke,batch=many"], ["'batch'", "int", "many"], marks=pytest.mark.slow
        ),
        pytest.param(["--config=configs/fvq16k.py:smok"], ["smok", "smoke"], marks=pytest.mark.slow),
        (["--workdir=/dev/null/x"], ["workdir /dev/null/x"]),
        (["--workdir="], ["--workdir= is empty"]),
        pytest.param(["--workdir=EMPTY/a*b"], ["a*b", "'*'"], marks=pytest.mark.slow),
        pytest.param(["--config="], ["--config= is empty"], marks=pytest.mark.slow),
        pytest.param(["--config=EMPTY"], ["EMPTY", "cannot be read"], marks=pytest.mark.slow),
        pytest.param(["--explain=maybe"], ["--explain=maybe"], marks=pytest.mark.slow),
        pytest.param(["--profile_steps=5:4"], ["--profile_steps=5:4"], marks=pytest.mark.slow),
        pytest.param(["--distributed_timeout=0"], ["--distributed_timeout must be 1 to"], marks=pytest.mark.slow),
        pytest.param(
            ["--distributed", "--num_processes=2", "--process_id=2"], ["none of the 2"], marks=pytest.mark.slow
        ),
        pytest.param(["--config.init_from=EMPTY"], ["init_from: ", "EMPTY"], marks=pytest.mark.slow),
        pytest.param(
            ["--config.data.source=array_record", "--config.data.train_dir=EMPTY"],
            ["data.eval_dir"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith(("-", "s")) else None,
)
def test_bad_input_is_one_line_and_exit_2(run_prepared, tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    args = [arg.replace("EMPTY", str(tmp_path / "empty")) for arg in args]
    words = [word.replace("EMPTY", str(tmp_path / "empty")) for word in words]
    base = ["--config=configs/fvq16k.py:smoke", f"--workdir={tmp_path / 'run'}"]
    code, out, err = run_prepared(*base, *args)
    assert code == 2, err
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("fvq_jax: ")
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "run" / "config.json").exists()


def test_needs_config_and_workdir(run_prepared):
    code, _, err = run_prepared()
    assert code == 2
    assert "--workdir" in err


def test_help_shows_the_flags_of_a_run_and_exits_0(run_prepared):
    code, out, err = run_prepared("--help")
    assert (code, err) == (0, "")
    for flag in ("config", "workdir", "[no]explain", "[no]distributed", "profile_steps"):
        assert f"  --{flag}:" in out


@pytest.mark.slow
def test_a_loss_that_is_not_finite_exits_1(run_prepared, tmp_path):
    code, out, err = run_prepared(*SMALLEST, f"--workdir={tmp_path}", "--config.optim.learning_rate=1e38")
    assert code == 1
    assert out == ""
    assert "fvq_jax: step " in err.splitlines()[-1]
    assert "loss/total is" in err.splitlines()[-1]


def test_the_program_waits_for_other_hosts_as_long_as_told(tmp_path):
    others = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    others["KUBERNETES_SERVICE_HOST"] = "127.0.0.1"  # where JAX asks for a package, unless it has all it needs
    command = [sys.executable, "-m", "fvq_jax.main", *SMALLEST, f"--workdir={tmp_path}"]
    command += ["--distributed", "--distributed_timeout=1"]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | others, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "after 1 s not all processes have come" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_flags_reach_the_run(tmp_path):
    """Compiled programs are kept in the workdir, unless the environment says where; 120 s is how long hosts wait."""
    code = """
import jax
from fvq_jax import main
from fvq_jax.runtime import flags
from fvq_jax.training.loop import Result

def train(task, config, workdir, profile_steps):
    cache, timeout = jax.config.jax_compilation_cache_dir, flags.DISTRIBUTED_TIMEOUT.value
    print(cache, timeout, task.__name__, config.seed, workdir, *profile_steps)
    return Result({}, interrupted=True)

main.train = train
raise SystemExit(main.main(main.parse_flags(__import__("sys").argv)))
"""
    for chosen, cache in (("", f"{tmp_path}/compilation_cache"), ("/elsewhere", "/elsewhere")):
        args = [*SMALLEST, f"--workdir={tmp_path}", "--config.seed=3", "--profile_steps=2:4"]
        command = [sys.executable, "-c", code, *args]
        environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": chosen}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == 75, ended.stderr
        assert ended.stdout.split() == [cache, "120", "TokenizerTask", "3", str(tmp_path), "2", "4"]
