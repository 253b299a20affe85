"""Two processes of one run: they begin together or not at all, and stop together."""

import json
import os
import re
import signal

import pytest

from tests.helpers.pictures import write_pictures
from tests.helpers.program import Prepared
from tests.helpers.two_hosts import free_port


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    prepared = Prepared(tmp_path_factory.mktemp("programs"))
    yield prepared
    prepared.close()


def start(prepared, first, second):
    """Both processes, each with options of its own; where they meet is told by flags."""
    together = ["--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [prepared.start(*together, f"--process_id={index}", *own) for index, own in enumerate((first, second))]


@pytest.mark.slow
def test_another_config_on_one_host_is_named(prepared, tmp_path):
    workdir = f"--workdir={tmp_path}"
    programs = start(prepared, [workdir], [workdir, "--config.optim.learning_rate=0.5"])
    for code, line in [program.end() for program in programs]:
        assert code == 2
        assert line.startswith("fvq_jax: process 1 differs from process 0: config.optim.learning_rate is 0.5 and not ")
    assert not (tmp_path / "config.json").exists()


def test_hosts_that_do_not_see_the_same_checkpoints_are_named(prepared, tmp_path):
    """As where the workdir is a local folder of each host."""
    (tmp_path / "0" / "checkpoints" / "step_3").mkdir(parents=True)
    programs = start(prepared, *([f"--workdir={tmp_path / str(index)}"] for index in range(2)))
    for code, line in [program.end() for program in programs]:
        assert code == 2
        assert line.startswith("fvq_jax: process 1 differs from process 0: checkpoint is None and not 3;")


@pytest.mark.slow
def test_a_signal_to_one_process_is_one_save_of_all(prepared, tmp_path):
    options = [f"--workdir={tmp_path}", "--distributed_timeout=60", "--config.steps=100000"]
    programs = start(prepared, options, options)
    assert programs[0].wait_for(lambda: "step 2/" in programs[0].said()), programs[0].said()
    os.kill(programs[1].pid, signal.SIGTERM)
    ends = [program.end() for program in programs]
    assert [code for code, _ in ends] == [75, 75], [program.said() for program in programs]
    for index, (program, why) in enumerate(zip(programs, ("another process was told to stop", "SIGTERM"), strict=True)):
        saved = re.search(rf"{why}: saved step (\d+)", program.said())
        assert saved, program.said()
        assert (tmp_path / "checkpoints" / f"step_{saved[1]}").is_dir()
        assert saved[0] in (tmp_path / "logs" / f"host_00{index}.log").read_text()
        heartbeat = json.loads((tmp_path / "heartbeat" / f"host_00{index}.json").read_text())
        assert (heartbeat["step"], heartbeat["phase"], heartbeat["pid"]) == (int(saved[1]), "saving", program.pid)
        assert '"step"' not in program.out.read_text()  # no result


@pytest.mark.slow
def test_a_picture_that_one_process_cannot_read_is_one_save_of_all(prepared, tmp_path):
    paths = {split: write_pictures(tmp_path / split, [f"{n:02}.png" for n in range(32)]) for split in ("train", "eval")}
    options = [f"--workdir={tmp_path / 'run'}", "--distributed_timeout=60", "--config.steps=100000"]
    options += [f"--config.data.{split}_dir={tmp_path / split}" for split in paths]
    options += ["--config.data.source=folder", "--config.data.max_unreadable=0.0"]
    programs = start(prepared, options, options)
    assert programs[0].wait_for(lambda: "step 2/" in programs[0].said()), programs[0].said()
    paths["train"][7].write_bytes(b"no picture")
    ends = [program.end() for program in programs]
    assert [code for code, _ in ends] == [2, 2], [program.said() for program in programs]
    assert ends[0][1] == ends[1][1]
    assert re.match(r"fvq_jax: process [01]: 1 of 32 pictures are unreadable, and 0 may be .*07\.png", ends[0][1])
    (step,) = {re.search(r"saved step (\d+)", program.said())[1] for program in programs}
    assert (tmp_path / "run" / "checkpoints" / f"step_{step}").is_dir()
