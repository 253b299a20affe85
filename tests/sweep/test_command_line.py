"""`python -m fvq_jax.sweep` as a program. What it does with points is in test_runner.py."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.sweep.__main__ import choose, exit_code, summary
from fvq_jax.sweep.points import LOG, make_points, read_record
from fvq_jax.sweep.runner import Outcome
from tests.helpers.quick_compile import FLAGS
from tests.helpers.slow_cases import slow
from tests.helpers.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from tests.helpers.quick_compile import FLAGS
from tests.helpers.tiny import tiny_config


def get_config(arg=""):
    return tiny_config(steps=1, batch_size=8, **{"optim.warmup_steps": 0})


def sweep(arg=""):
    yield {"tokenizer.quantizer.bridge": "none", "mesh.codebook": 2}
    yield {"tokenizer.quantizer.bridge": "none"}
    yield {"tokenizer.quantizer.codebook_size": 1000}
"""
# One device, so that the first point is refused by its run.
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": " ".join(FLAGS),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


def run(*args, **environment):
    command = [sys.executable, "-m", "fvq_jax.sweep", *args]
    environment = ENVIRONMENT | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return f"--config={path}"


@pytest.fixture(scope="module")
def points():
    return make_points(tiny_config(), [{"seed": seed} for seed in range(7)], pathlib.Path("sweep"))


@pytest.mark.slow
def test_real_points_are_run_and_those_that_cannot_are_named(tmp_path, config):
    workdir = tmp_path / "sweep"
    result = run(config, f"--workdir={workdir}", "--parallel=2", "--config.eval.images=16")
    assert result.returncode == 2, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert {name: last[name] for name in ("points", "finished", "run_now", "failed", "interrupted", "waiting")} == {
        "points": 3,
        "finished": 1,
        "run_now": 2,
        "failed": [],
        "interrupted": [],
        "waiting": [],
    }
    errors = {refused["point"]: refused["error"] for refused in last["refused"]}
    assert "does not fit 1 devices" in errors["tokenizer.quantizer.bridge=none,mesh.codebook=2"]
    assert "1000 codes are not a square" in errors["tokenizer.quantizer.codebook_size=1000"]
    record = read_record(workdir / "tokenizer.quantizer.bridge=none")
    assert record.status == "finished"
    assert record.summary["step"] == 1
    assert record.summary["images"] == 16  # what was overridden on the command line
    assert record.summary["parameters"] > 64 * 8
    assert "evaluation at step 1" in (workdir / "tokenizer.quantizer.bridge=none" / LOG).read_text()


def test_a_dry_run_shows_the_commands_and_needs_no_device(tmp_path, config):
    args = (config, f"--workdir={tmp_path / 'sweep'}", "--config.init_from=my run", "--dry-run")
    result = run(*args, JAX_PLATFORMS="nowhere")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "0 tokenizer.quantizer.bridge=none,mesh.codebook=2 (a multiple of 2 devices)"
    assert lines[1].endswith(
        "'--config.init_from=my run' --config.tokenizer.quantizer.bridge=none --config.mesh.codebook=2"
    )
    assert "-m fvq_jax.main --config=" in lines[1]
    assert lines[2] == "1 tokenizer.quantizer.bridge=none (any number of devices)"
    assert "refused: tokenizer.quantizer: codebook_size 1000" in lines[4]
    assert json.loads(lines[-1]) == {"points": 3}
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("flag", ["--distributed", *slow("--process_id=0", "--profile_steps=1:2")])
def test_what_is_for_a_single_run_is_refused(tmp_path, config, flag):
    result = run(config, f"--workdir={tmp_path / 'sweep'}", flag)
    assert result.returncode == 2
    assert result.stderr.startswith(f"fvq_jax: {flag.split('=')[0]} is for a single run")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_a_report_of_nothing_is_refused_in_one_line(tmp_path):
    result = run("report", str(tmp_path))
    assert result.returncode == 2
    assert (
        result.stderr == f"fvq_jax: no point of a sweep in {tmp_path}: give the --workdir of a sweep that was started\n"
    )
    assert result.stdout == ""


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_shards_take_every_point_once(points, count):
    taken = [point.index for shard in range(count) for point in choose(points, None, f"{shard}/{count}")]
    assert sorted(taken) == list(range(7))
    assert [point.index for point in choose(points, None, f"0/{count}")] == list(range(0, 7, count))


def test_an_index_takes_one_point(points):
    assert choose(points, 3, "0/1") == [points[3]]
    with pytest.raises(InputError, match="--index=7: this sweep has 7 points, counted from 0"):
        choose(points, 7, "0/1")
    with pytest.raises(InputError, match="--index=3 already is one point: leave --shard=1/2 out"):
        choose(points, 3, "1/2")


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "0/0", ""])
def test_a_shard_that_is_none_is_refused(points, shard):
    with pytest.raises(InputError, match=f"--shard={shard} must be I/N"):
        choose(points, None, shard)


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["finished"], 0),
        ([], 0),
        (["finished", "elsewhere"], 0),
        (["finished", "refused"], 2),
        (["refused", "failed"], 1),
        (["failed", "interrupted"], 75),
        (["finished", "waiting"], 75),
    ],
)
def test_the_exit_code_says_what_is_left(points, statuses, code):
    assert exit_code([Outcome(points[0], status) for status in statuses]) == code


def test_the_summary_names_what_is_not_finished(points):
    outcomes = [
        Outcome(points[0], "finished", ran=True, exit_code=0, summary={"usage": 1.0}),
        Outcome(points[1], "finished"),
        Outcome(points[2], "failed", ran=True, exit_code=1, error="no"),
        Outcome(points[3], "elsewhere"),
        Outcome(points[4], "interrupted", ran=True, exit_code=75),
        Outcome(points[5], "waiting"),
    ]
    assert summary(outcomes) == {
        "points": 6,
        "finished": 2,
        "run_now": 3,
        "failed": [{"point": "seed=2", "exit_code": 1, "error": "no", "log": "sweep/seed=2/log.txt"}],
        "refused": [],
        "interrupted": ["seed=4"],
        "elsewhere": ["seed=3"],
        "waiting": ["seed=5"],
    }
