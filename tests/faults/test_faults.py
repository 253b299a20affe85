"""Ends runs in all the ways in which they can end, and looks at what is left.

`make test-all` runs a short form; FAULTS=all, which `make faults` sets, the whole, and writes the table of
docs/reliability.md.
"""

import datetime
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from fvq_jax.runtime.checksums import FILE as CHECKSUMS
from fvq_jax.runtime.checksums import find_damage
from fvq_jax.runtime.workdir_lock import hold
from fvq_jax.training.metric_files import read_metrics
from tests.helpers.program import ROOT, SMALLEST, SMALLEST_GENERATOR, Prepared
from tests.helpers.tiny import random_images
from tests.helpers.tiny_generator import write_splits
from tests.helpers.two_hosts import free_port

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")  # weights are compared on the host
ALL = os.environ.get("FAULTS") == "all"
EVERY = 4  # steps between two checkpoints
STEPS = 24 if ALL else 12
RUN = (f"--config.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}")
HOST, WORKER = 120, 60  # seconds in which the others must end
COMPILING = 3  # seconds after the start of compiling at which a signal comes
FLIPPED, TRUNCATED = "one bit of a file flipped", "a file truncated"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    prepared = Prepared(tmp_path_factory.mktemp("programs"))
    yield prepared
    prepared.close()


@pytest.fixture(scope="module")
def table():
    """Rows of docs/reliability.md: fault, tries, lost steps, what happened."""
    rows = []
    yield rows
    if ALL:
        path = ROOT / "docs" / "reliability.md"
        lines = ["| fault | tries | lost steps | what the run did |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
        with open("/proc/cpuinfo") as file:
            processor = re.search(r"model name\s*: (.*)", file.read())
        where = f"{os.cpu_count()} CPU cores ({processor[1] if processor else platform.machine()})"
        lines += ["", f"`make faults`, {datetime.date.today()}, {where}; checkpoints every {EVERY} of {STEPS} steps."]
        begin, end = "<!-- table -->\n", "<!-- end of table -->"
        before, rest = path.read_text().split(begin)
        path.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """The workdir of a run that nothing disturbed, and the seconds it took."""
    return undisturbed(prepared, tmp_path_factory.mktemp("uninterrupted"))


def undisturbed(prepared, workdir):
    began = time.monotonic()
    program = prepared.start(*RUN, f"--workdir={workdir}")
    code, _ = program.end()
    assert code == 0, program.said()
    return workdir, time.monotonic() - began


def state(workdir, step=STEPS):
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(workdir / "checkpoints" / f"step_{step}" / "state")


def assert_same_weights(ours, theirs):
    ours, theirs = state(ours), state(theirs)
    for (path, our), their in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(our, their, err_msg=jax.tree_util.keystr(path))


def steps_done(workdir):
    return max((row["step"] for row in read_metrics(workdir)), default=0)


def is_saving(workdir):
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("step_*"))


def resumed_from(program):
    """The step it went on from, 0 if it began anew; None if it was killed before that."""
    found = re.findall(r"restored step (\d+)|step 1/", program.said())
    return int(found[0] or 0) if found else None


def complete_steps(workdir):
    return [int(path.name[5:]) for path in (workdir / "checkpoints").glob("step_*") if path.name[5:].isdigit()]


def whole_steps(workdir):
    """The steps of the checkpoints whose files are all there, as their checksums say."""
    folders = {step: workdir / "checkpoints" / f"step_{step}" for step in complete_steps(workdir)}
    return [step for step, path in folders.items() if (path / CHECKSUMS).exists() and not find_damage(path)]


def kill_at(program, moment):
    """Whether the program still ran at that time."""
    if program.wait_for(lambda: time.monotonic() > moment):
        program.kill()
        return True
    return False


def kill_while_saving(program, workdir, wait):
    """Whether it came to save, `wait` seconds before the end that it gets now."""
    before = complete_steps(workdir)  # and what an earlier kill left unfinished goes when the run starts
    resumed = program.wait_for(lambda: "compiled the step" in program.said())
    if resumed and program.wait_for(lambda: is_saving(workdir) or complete_steps(workdir) != before, every=0.002):
        time.sleep(wait)
        program.kill()
        return True
    return False


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_from_a_complete_checkpoint(prepared, uninterrupted, tmp_path, table):
    kill_and_go_on(prepared, uninterrupted, tmp_path, table, "`kill -9` at a random moment", 20 if ALL else 3)


@pytest.mark.slow
def test_killed_at_any_moment_the_training_of_a_generator_goes_on(tmp_path_factory, table):
    """With its moving average, and codes whose order and crops follow from the step."""
    folder = tmp_path_factory.mktemp("generator")
    write_splits(folder)
    data = [f"--config.data.{split}_dir={folder / split}" for split in ("train", "eval")]
    prepared = Prepared(folder, (*SMALLEST_GENERATOR, *data))
    try:
        whole = undisturbed(prepared, folder / "uninterrupted")
        kill_and_go_on(prepared, whole, folder, table, "the same, training a generator", 20 if ALL else 1)
    finally:
        prepared.close()


def kill_while_moving(program, workdir, wait):
    """The same, from when the folder of a checkpoint begins to have its final name."""
    before = complete_steps(workdir)
    resumed = program.wait_for(lambda: "compiled the step" in program.said())
    if resumed and program.wait_for(lambda: set(complete_steps(workdir)) - set(before), every=0.002):
        time.sleep(10 * wait)  # it takes so much longer in `tests.helpers.bucket`
        program.kill()
        return True
    return False


@pytest.mark.slow
def test_killed_at_any_moment_on_a_mounted_bucket_no_checkpoint_is_read_that_is_not_whole(
    prepared, uninterrupted, tmp_path, table
):
    """A folder is renamed file by file there. Where files are listed late, checkpoints cannot be: that is refused."""
    bucket = Prepared(tmp_path, world="tests.helpers.bucket")
    try:
        fault, kills = "`kill -9` where folders are renamed file by file", 10 if ALL else 2
        kill_and_go_on(bucket, uninterrupted, tmp_path, table, fault, kills, kill_while_moving)
        (code, line), said = refused(bucket, tmp_path / "late", LISTED_AFTER="3")
    finally:
        bucket.close()
    assert code == 2
    assert "does not list a file as soon as it is written" in line
    assert "Traceback" not in said
    table.append(
        ("workdir that lists files late", 1, 0, f"ended with 2: `{line}`".replace(str(tmp_path / "late"), "DIR"))
    )


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(uninterrupted, tmp_path, table):
    """Also over a kill and a restart."""
    whole, _ = uninterrupted
    prepared = Prepared(tmp_path, world="tests.helpers.jumping_clock")
    workdir, options = tmp_path / "run", ("--config.data.num_workers=1", "--config.eval.every_steps=5")
    try:
        program = prepared.start(*RUN, *options, f"--workdir={workdir}")
        assert program.wait_for(lambda: f"step {EVERY + 2}/" in program.said()), program.said()
        program.kill()
        assert program.end()[0] in (-9, 0)
        program = prepared.start(*RUN, *options, f"--workdir={workdir}")
        assert program.end()[0] == 0, program.said()
    finally:
        prepared.close()
    assert_same_weights(workdir, whole)
    assert sorted(complete_steps(workdir)) == [STEPS - EVERY, STEPS]
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "eval/psnr" in row] == [*range(5, STEPS, 5), STEPS]
    durations = [(name, value) for row in rows for name, value in row.items() if "time/" in name or "_per_" in name]
    assert durations
    assert all(0 <= value < 1000 * 86_400 for _, value in durations), durations
    assert all(value < 600 for name, value in durations if "time/" in name), durations
    assert all(0 < row["goodput"] < 1 for row in rows if "goodput" in row)
    table.append(
        ("clock that jumps by a day and a year", 1, EVERY, "the same weights, checkpoints, evaluations; no odd figure")
    )


def kill_and_go_on(prepared, uninterrupted, folder, table, fault, kills, kill_on_purpose=kill_while_saving):
    """Every second time while a checkpoint is being written; one `kill -9` after the other, the run ends the same."""
    rng = np.random.default_rng(0)
    whole, seconds = uninterrupted
    lost, saving, runs = [], 0, 1
    while True:
        workdir = folder / str(runs)
        before, done = max(whole_steps(workdir), default=0), steps_done(workdir)
        program = prepared.start(*RUN, f"--workdir={workdir}")
        if len(lost) == kills:
            killed = False
        elif len(lost) % 2:
            killed = kill_on_purpose(program, workdir, rng.uniform(0, 0.05))
        else:
            killed = kill_at(program, time.monotonic() + rng.uniform(0, seconds))
        code, _ = program.end()
        assert code == 0 or (killed and code == -9), program.said()
        killed = code == -9  # and not come to its end just before
        assert resumed_from(program) in (None, before)
        if killed:
            saving += is_saving(workdir)
            lost.append(max(done, steps_done(workdir)) - max(whole_steps(workdir), default=0))
            continue
        assert_same_weights(workdir, whole)
        assert not is_saving(workdir)  # what was half written has been removed
        steps = [row["step"] for row in read_metrics(workdir) if "loss/total" in row]
        assert steps == list(range(1, STEPS + 1))
        if len(lost) == kills:
            break
        runs += 1
    assert saving or kills == 1
    what = f"{runs} runs went on to the weights of the uninterrupted one, bit for bit ({saving} kills while saving)"
    table.append((fault, kills, f"{np.mean(lost):.1f}, at most {max(lost)}", what))


@pytest.mark.slow
def test_a_signal_while_the_step_compiles_is_answered_at_once(tmp_path, table):
    """At the start and, with FAULTS=all, in a start that goes on from a checkpoint."""
    compiled, workdir = tmp_path / "compiled", tmp_path / "run"
    larger = ("--config.tokenizer.ch_mult=(1,1,2)",)
    cold = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    prepared = Prepared(tmp_path, (*SMALLEST, *larger), **cold)
    said = []

    def stop_while_compiling():
        before = complete_steps(workdir)
        program = prepared.start(*RUN, f"--workdir={workdir}")
        heartbeat = workdir / "heartbeat" / "host_000.json"
        assert program.wait_for(lambda: heartbeat.exists() and f"{program.pid}, " in heartbeat.read_text())
        time.sleep(COMPILING)
        program.stop()
        stopped = time.monotonic()
        assert program.wait_for(lambda: "SIGTERM: the run saves and ends as soon as" in program.said())
        said.append(time.monotonic() - stopped)
        assert "compiled the step" not in program.said()  # it was heard in the middle of that
        assert program.end()[0] == 75, program.said()
        assert "start me again" in program.said()
        assert complete_steps(workdir) == before or not before
        for step in before:
            assert not find_damage(workdir / "checkpoints" / f"step_{step}")

    try:
        stop_while_compiling()
        if ALL:
            program = prepared.start(*RUN, f"--workdir={workdir}")
            assert program.wait_for(lambda: EVERY in complete_steps(workdir)), program.said()
            program.stop()
            assert program.end()[0] == 75, program.said()
            shutil.rmtree(compiled)
            stop_while_compiling()
        program = prepared.start(*RUN, f"--workdir={workdir}")
        assert program.end()[0] == 0, program.said()
        whole, _ = undisturbed(prepared, tmp_path / "whole")
    finally:
        prepared.close()
    assert_same_weights(workdir, whole)
    assert max(said) < 10
    what = f"said what follows after {max(said):.1f} s, ended with 75 when the step was compiled, and went on to the "
    table.append(("SIGTERM while the step compiles", len(said), 0, what + "weights of the uninterrupted run"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [FLIPPED, TRUNCATED] if ALL else [FLIPPED])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(prepared, uninterrupted, tmp_path, table, fault):
    whole, _ = uninterrupted
    newest = whole / "checkpoints" / f"step_{STEPS}"
    names = [line.split()[1] for line in (newest / CHECKSUMS).read_text().splitlines()]
    largest = max(names, key=lambda name: (newest / name).stat().st_size)
    for number, name in enumerate(names if ALL else [largest]):
        workdir = tmp_path / str(number)
        subprocess.run(["cp", "-r", whole, workdir], check=True)
        content = bytearray((newest / name).read_bytes())
        if fault == TRUNCATED:
            del content[len(content) // 2 :]
        else:
            content[len(content) // 2] ^= 1
        (workdir / "checkpoints" / f"step_{STEPS}" / name).write_bytes(content)
        program = prepared.start(*RUN, f"--workdir={workdir}")
        code, _ = program.end()
        assert code == 0, program.said()
        assert (
            f"step_{STEPS} is damaged and was moved to {workdir}/checkpoints_damaged: {name} has changed"
            in program.said()
        )
        assert resumed_from(program) == STEPS - EVERY
        assert_same_weights(workdir, whole)
    what = "named the file, moved the checkpoint aside, went on from the one before to the same weights"
    table.append((f"last checkpoint: {fault}", number + 1, EVERY, what))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts an empty disk of so many bytes."""
    mounted = []

    def mount(size):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(prepared, uninterrupted, small_disk, table):
    whole, _ = uninterrupted
    used = sum(path.stat().st_size for path in (whole / "checkpoints" / f"step_{STEPS}").rglob("*"))
    tries = (1.5, 1.7, 1.9, 2.1, 2.5) if ALL else (1.6,)
    for times in tries:
        workdir = small_disk(int(times * used) + 2**18) / "run"
        program = prepared.start(*RUN, f"--workdir={workdir}")
        code, line = program.end()
        assert code == 1, program.said()
        assert program.said().splitlines()[-1] == line  # TensorStore's threads may have had their say before
        assert "No space left on device" in line
        last = max(complete_steps(workdir))
        assert f"the checkpoint of step {last} is complete" in line
        subprocess.run(["mount", "-o", "remount,size=100M", workdir.parent], check=True)
        program = prepared.start(*RUN, f"--workdir={workdir}")
        assert program.end()[0] == 0, program.said()
        assert resumed_from(program) == last
        assert_same_weights(workdir, whole)
    table.append(
        (
            "disk full while saving",
            len(tries),
            f"at most {EVERY}",
            f"ended with 1: `{line}`".replace(str(workdir), "DIR"),
        )
    )


def test_a_read_only_workdir_is_refused(prepared, small_disk, table):
    disk = small_disk(2**20)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (code, line), said = refused(prepared, disk)
    assert code == 2
    assert line == f"fvq_jax: workdir {disk} cannot be written: Read-only file system"
    assert "Traceback" not in said
    table.append(("workdir on a read-only file system", 1, 0, f"ended with 2: `{line}`".replace(str(disk), "DIR")))


def refused(prepared, workdir, **environment):
    program = prepared.start(*RUN, f"--workdir={workdir}", **environment)
    return program.end(), program.said()


def test_a_second_process_in_the_same_workdir_is_refused(prepared, tmp_path, table):
    with hold(tmp_path):
        (code, line), said = refused(prepared, tmp_path)
    assert code == 2
    holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d .*"
    assert re.fullmatch(rf"fvq_jax: workdir {tmp_path} is in use by {holder}: use another workdir", line)
    assert "Traceback" not in said
    shown = line.replace(str(tmp_path), "DIR").replace(socket.gethostname(), "HOST")
    table.append(("second process in the same workdir", 1, 0, f"ended with 2: `{shown}`"))


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_to_its_end_ends_the_run(prepared, tmp_path, table):
    """As on a network mount that no longer answers: opening the file hangs."""
    for workers in (0, 1) if ALL else (1,):
        pictures = tmp_path / f"pictures{workers}"
        for split, count in (("train", 64), ("eval", 8)):
            (pictures / split).mkdir(parents=True)
            for index, image in enumerate(random_images(count, 16)):
                Image.fromarray(image).save(pictures / split / f"{index}.png")
        os.mkfifo(tmp_path / f"fifo{workers}")
        folders = [f"--config.data.{split}_dir={pictures / split}" for split in ("train", "eval")]
        options = ["--config.data.source=folder", f"--config.data.num_workers={workers}", "--config.data.timeout=20"]
        options += ["--config.steps=100000", f"--workdir={tmp_path / f'run{workers}'}"]
        program = prepared.start(*folders, *options)
        assert program.wait_for(lambda program=program: "step 2/" in program.said()), program.said()
        began = time.monotonic()
        for path in (pictures / "train").iterdir():
            path.unlink()
            path.symlink_to(tmp_path / f"fifo{workers}")
        code, line = program.end()
        seconds = time.monotonic() - began
        assert code == 1, program.said()
        assert "no batch for 20 s" in line
        assert "Traceback" not in program.said()
        assert seconds < WORKER
        assert complete_steps(tmp_path / f"run{workers}")
    what = f"ended with 1 after {seconds:.0f} s (`data.timeout=20`): `{line}`"
    table.append(("pictures that hang when opened", 2 if ALL else 1, "since the last checkpoint", what))


@pytest.mark.slow
def test_a_killed_data_worker_ends_the_run(prepared, tmp_path, table):
    options = ["--config.data.num_workers=1", "--config.steps=100000", f"--workdir={tmp_path}"]
    program = prepared.start(*options)
    assert program.wait_for(lambda: "step 2/" in program.said()), program.said()
    children = pathlib.Path(f"/proc/{program.pid}/task").glob("*/children")
    workers = [pid for path in children for pid in path.read_text().split() if is_worker(pid)]
    assert workers
    began = time.monotonic()
    for pid in workers:
        os.kill(int(pid), 9)
    code, line = program.end()
    seconds = time.monotonic() - began
    assert code == 1, program.said()
    assert "no more batches" in line
    assert "Traceback" not in program.said()
    assert seconds < WORKER
    table.append(
        ("data worker killed", 1, "since the last checkpoint", f"ended with 1 after {seconds:.0f} s: `{line}`")
    )


def is_worker(pid):
    return b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1] if ALL else [1])
def test_a_killed_process_ends_the_others(prepared, tmp_path, table, victim):
    options = ["--distributed", "--distributed_timeout=60", "--config.steps=100000", f"--workdir={tmp_path}"]
    environment = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    programs = [prepared.start(*options, **environment, JAX_PROCESS_ID=str(index)) for index in range(2)]
    assert programs[0].wait_for(lambda: "step 2/" in programs[0].said()), programs[0].said()
    began = time.monotonic()
    programs[victim].kill()
    code, line = programs[1 - victim].end()
    seconds = time.monotonic() - began
    programs[victim].end()
    assert code not in (0, 75)
    assert line.startswith("fvq_jax: "), programs[1 - victim].said()
    assert "start all of them again" in line
    assert seconds < HOST
    shown = line.replace(socket.gethostname(), "HOST")
    table.append(
        (
            f"process {victim} of two killed",
            1,
            "since the last checkpoint",
            f"the other ended after {seconds:.0f} s: `{shown}`",
        )
    )
