import signal

import pytest

from tests.helpers.stand_ins import PROGRAM, SECONDS, put, run, running, wait_for


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


def test_local_starts_another_program_and_its_command_comes_first(local):
    for given in (["sample", "--generator=g", "--out=o"], ["tokenize", "extract", "--out=o"]):
        result = run("local.sh", "--dry-run", "2", *given, **local)
        assert result.returncode == 0
        for line in result.stdout.splitlines():
            assert line.split()[-len(given) - 2 :] == ["-m", f"fvq_jax.{given[0]}", *given[1:], "--distributed"]
