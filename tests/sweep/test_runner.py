"""The runner with a program that stands for fvq_jax.main; the real one is in test_command_line.py."""

import os
import signal
import subprocess
import sys

import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.sweep import runner
from fvq_jax.sweep.points import LOG, make_points, read_record, try_lock, write_record
from fvq_jax.sweep.runner import run_points
from tests.helpers.tiny import tiny_config

# What the run does, by its seed; before that it leaves a mark that it was begun.
PROGRAM = """
import os, signal, sys, time
action, workdir = sys.argv[1:]
print("x", file=open(os.path.join(workdir, "begun"), "a"))
print("some line", file=sys.stderr, flush=True)
{actions}
"""
FINE = "print('noise'); print('{\"usage\": 0.5, \"psnr\": 20.0}')"
ACTIONS = {
    "fine": FINE,
    "error": "print('fvq_jax: step 3: loss/total is nan\\nlast', file=sys.stderr); sys.exit(1)",
    "crash": "raise OSError('disk full')",
    "refuse": "print('fvq_jax: mesh.data=2 does not fit', file=sys.stderr); sys.exit(2)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "silent": "sys.exit(0)",
    "saved": "sys.exit(75)",
    # Saves and ends at the signal that the sweep hands on; dies of the one that it got.
    "stop": """
signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.2), sys.exit(75)))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(30)""",
    "default": "os.kill(os.getppid(), signal.SIGTERM); signal.signal(signal.SIGINT, signal.SIG_DFL); time.sleep(30)",
}
NAMES = list(ACTIONS)


def points_of(tmp_path, *actions, **changes):
    sweep = [{"seed": 100 * place + NAMES.index(action)} for place, action in enumerate(actions)]
    return make_points(tiny_config(**changes), sweep, tmp_path)


def command(point):
    action = NAMES[point.overrides["seed"] % 100]
    return [sys.executable, "-IS", "-c", PROGRAM.format(actions=ACTIONS[action]), action, str(point.workdir)]


def begun(point):
    path = point.workdir / "begun"
    return path.read_text().count("x") if path.exists() else 0


def test_points_are_run_once_and_their_results_kept(tmp_path):
    points = points_of(tmp_path, "fine", "fine", "fine")
    outcomes = run_points(points, command, parallel=2)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    assert all(outcome.ran for outcome in outcomes)
    assert {outcome.point.name for outcome in outcomes} == {point.name for point in points}
    record = read_record(points[0].workdir)
    assert record.status == "finished"
    assert record.summary == {"usage": 0.5, "psnr": 20.0}
    assert record.config == points[0].config
    assert "some line" in (points[0].workdir / LOG).read_text()

    outcomes = run_points(points, command)
    assert [(outcome.status, outcome.ran) for outcome in outcomes] == [("finished", False)] * 3
    assert [begun(point) for point in points] == [1, 1, 1]


def test_a_changed_config_is_run_again(tmp_path):
    run_points(points_of(tmp_path, "fine"), command)
    (outcome,) = run_points(points_of(tmp_path, "fine", **{"tokenizer.quantizer.code_dim": 16}), command)
    assert outcome.ran
    assert begun(outcome.point) == 2


@pytest.mark.parametrize(
    ("action", "status", "code", "error"),
    [
        ("error", "failed", 1, "step 3: loss/total is nan"),
        ("crash", "failed", 1, "OSError: disk full"),
        ("refuse", "refused", 2, "mesh.data=2 does not fit"),
        ("killed", "failed", -9, "killed by SIGKILL after: some line"),
        ("silent", "failed", 0, "it ended without a result line"),
        ("saved", "interrupted", 75, ""),
    ],
)
def test_what_fails_is_named_and_the_rest_go_on(tmp_path, action, status, code, error):
    points = points_of(tmp_path, action, "fine")
    bad, fine = run_points(points, command)
    assert (bad.status, bad.exit_code, bad.error) == (status, code, error)
    assert bad.log == points[0].workdir / LOG
    assert fine.status == "finished"
    record = read_record(points[0].workdir)
    assert (record.status, record.exit_code, record.error) == (status, code, error)

    bad, _ = run_points(points, command)  # tried again; its error is that of the second attempt
    assert (bad.status, bad.error) == (status, error)
    assert [begun(point) for point in points] == [2, 1]


def test_a_refused_point_is_not_begun(tmp_path):
    wrong, fine = make_points(tiny_config(), [{"tokenizer.quantizer.codebook_size": 1000}, {"seed": 0}], tmp_path)
    outcomes = run_points([wrong, fine], command)
    assert [outcome.status for outcome in outcomes] == ["refused", "finished"]
    assert begun(wrong) == 0
    assert "not a square" in read_record(wrong.workdir).error


def test_a_signal_is_handed_on_once_and_nothing_else_begins(tmp_path):
    points = points_of(tmp_path, "stop", "fine")
    outcomes = run_points(points, command)
    assert [outcome.status for outcome in outcomes] == ["interrupted", "waiting"]
    assert outcomes[0].exit_code == 75
    assert begun(points[1]) == 0
    assert read_record(points[0].workdir).status == "interrupted"
    assert read_record(points[1].workdir).status == "waiting"  # so that a report shows it


def test_a_run_that_was_stopped_before_it_could_save_is_interrupted(tmp_path):
    (outcome,) = run_points(points_of(tmp_path, "default"), command)
    assert outcome.status == "interrupted"


def test_another_signal_reaches_the_runs_than_the_sweep_got():
    assert runner.PASSED_ON == {signal.SIGTERM: signal.SIGINT, signal.SIGINT: signal.SIGTERM}


def test_a_point_that_another_program_runs_is_left_to_it(tmp_path):
    points = points_of(tmp_path, "fine", "fine")
    points[0].workdir.mkdir(parents=True)
    write_record(points[0], "running")
    lock = try_lock(points[0].workdir)
    outcomes = run_points(points, command)
    assert [outcome.status for outcome in outcomes] == ["elsewhere", "finished"]
    assert begun(points[0]) == 0
    os.close(lock)
    assert run_points(points, command)[0].ran  # the other one died, and its record says running


def test_a_run_keeps_its_lock_when_the_sweep_is_killed(tmp_path):
    (point,) = points_of(tmp_path, "fine")
    point.workdir.mkdir()
    run = runner._begin(point, lambda _: [sys.executable, "-IS", "-c", "input()"])
    run.process.wait()  # its input is empty
    waiting = [sys.executable, "-IS", "-c", "import time; time.sleep(30)"]
    os.close(run.lock)
    run = runner._begin(point, lambda _: waiting)
    os.close(run.lock)  # as the death of the sweep would
    assert try_lock(point.workdir) is None
    run.process.kill()
    run.process.wait()
    lock = try_lock(point.workdir)
    assert lock is not None
    os.close(lock)


def test_runs_do_not_outlive_a_sweep_that_fails(tmp_path, monkeypatch):
    points = points_of(tmp_path, "fine", "fine")
    processes = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: processes.append(popen(*args, **kwargs)) or processes[0]
    )

    def broken(point):
        if point is points[1]:
            raise InputError("no such program")
        return [sys.executable, "-IS", "-c", "import time; time.sleep(30)"]

    with pytest.raises(InputError, match="no such program"):
        run_points(points, broken, parallel=2)
    assert processes[0].wait(timeout=60) == -signal.SIGKILL


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (point,) = make_points(tiny_config(), [{}], tmp_path / "file")
    with pytest.raises(InputError, match="cannot be used: Not a directory"):
        run_points([point], command)
