"""An evaluation by several processes: what ends it in one of them ends it in all, with one line each."""

import json
import time
import zipfile

import pytest
from PIL import Image

from tests.helpers.golden_case import GOLDEN
from tests.helpers.hanging_picture import with_hanging_picture
from tests.helpers.tiny import random_images
from tests.helpers.two_hosts import free_port, start_host

TIMEOUT = 60  # seconds, --distributed_timeout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run whose pictures must come within 2 s, the first ones within 10 s."""
    folder = tmp_path_factory.mktemp("written")
    with zipfile.ZipFile(GOLDEN / "written_at_0a70d9e.zip") as archive:
        archive.extractall(folder)
    path = folder / "workdir" / "config.json"
    config = json.loads(path.read_text())
    config["data"]["timeout"] = 2.0
    path.write_text(json.dumps(config))
    return path.parent


def evaluate_on_two(*options, program=("-m", "fvq_jax.evaluate")):
    """(exit code, own lines, all of standard error) of each of two processes, and the seconds until both had ended."""
    port, began = free_port(), time.monotonic()
    command = [*program, *options, "--distributed", f"--distributed_timeout={TIMEOUT}"]
    hosts = [start_host(index, 2, port, *command) for index in range(2)]
    said = [host.communicate(timeout=300)[1] for host in hosts]
    lines = [[line for line in text.splitlines() if line.startswith("fvq_jax: ")] for text in said]
    lines = [[line for line in own if "not computed" not in line] for own in lines]
    return [host.returncode for host in hosts], lines, said, time.monotonic() - began


@pytest.mark.slow
def test_pictures_that_stop_coming_in_one_process_end_both(workdir, tmp_path):
    """One of sixteen hangs."""
    (tmp_path / "pictures").mkdir()
    for index, image in enumerate(random_images(16, 16)):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{index:02}.png")
    options = [f"--workdir={workdir}", f"--data={tmp_path / 'pictures'}", f"--out={tmp_path / 'out'}", "--batch=8"]
    hangs = with_hanging_picture("05.png", "fvq_jax.evaluate")
    codes, lines, said, seconds = evaluate_on_two(*options, program=hangs)
    assert codes == [1, 1], said
    for own, text in zip(lines, said, strict=True):
        assert len(own) == 1, text
        assert "no batch for" in own[0]
        assert "Traceback" not in text
    assert lines[0] == lines[1]
    assert seconds < TIMEOUT + 60  # the start included
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_bad_input_in_one_process_is_said_by_both(workdir, tmp_path):
    """The second process cannot see the pictures."""
    port = free_port()
    command = ["-m", "fvq_jax.evaluate", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--distributed"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, image in enumerate(random_images(8, 16)):
        Image.fromarray(image).save(pictures / f"{index}.png")
    hosts = [
        start_host(index, 2, port, *command, f"--data={folder}")
        for index, folder in enumerate((pictures, tmp_path / "no"))
    ]
    said = [host.communicate(timeout=300)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [2, 2], said
    for text in said:
        (line,) = [line for line in text.splitlines() if line.startswith("fvq_jax: ")]
        assert line.startswith("fvq_jax: process 1: ")
