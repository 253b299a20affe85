"""Two processes of four simulated devices go on with the run of one process of eight, and do what that one does."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import pty
import shlex
import shutil
import subprocess
import sys
import termios
import threading

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import fvq16k
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import path_name
from fvq_jax.tasks import task_of
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.loop import Result, train
from fvq_jax.training.metric_files import read_metrics
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.tiny import make_step, random_images
from tests.helpers.two_hosts import free_port

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # test_coordination.py has two processes in every run of the suite
TRAIN, EVAL = 400, 24  # pictures: an epoch is longer than all that is read ahead
SECONDS = 1200  # after which a run that hangs is ended
CHANGES = {
    "mesh.codebook": 4,
    "batch_size": 16,
    "tokenizer.ch_mult": (1,),
    "tokenizer.z_channels": 16,
    "tokenizer.quantizer.codebook_size": 64,
    "tokenizer.quantizer.code_dim": 8,
    "tokenizer.quantizer.bridge": "XS/2-d1",
    "tokenizer.dtype": "float32",
    "adversarial.weight": 0.0,
    "data.source": "folder",
    "data.image_size": 16,
    "eval.batch_size": 16,
    "eval.images": 0,
    "checkpoint.every_steps": 2,
    "steps": 4,
}
# Runs at the start of every process: notes which pictures it opens.
NOTE_PICTURES = """
import os, sys

log = open(os.environ["PICTURES"] + "-opened-by-" + os.environ["JAX_PROCESS_ID"], "a", buffering=1)

def note(event, args):
    if event == "open" and str(args[0]).startswith(os.environ["PICTURES"]) and str(args[0]).endswith(".png"):
        log.write(os.path.relpath(args[0], os.environ["PICTURES"]) + "\\n")

sys.addaudithook(note)
"""


@dataclasses.dataclass(frozen=True)
class Runs:
    """One process with four steps; two processes with the last two of them, from a copy of its checkpoint."""

    config: ConfigDict
    one: pathlib.Path
    two: pathlib.Path
    result: Result  # of the one process
    codes: list[int]  # with which the two ended, and what follows for each of them
    printed: list[str]
    terminals: list[str]
    opened: list[set[str]]


def run_on_a_terminal(line, environment):
    """Runs a line of the shell with a terminal as its standard error."""
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = ["env", *shlex.split(line)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=theirs) as process:
        os.close(theirs)
        guard = threading.Timer(SECONDS, process.kill)
        guard.start()
        shown = []
        with contextlib.suppress(OSError):  # how a terminal says that no one writes to it any more
            while chunk := os.read(terminal, 4096):
                shown.append(chunk)
        os.close(terminal)
        out, _ = process.communicate()
        guard.cancel()
    return process.returncode, out, b"".join(shown).decode()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    pictures = folder / "pictures"
    for split, count in (("train", TRAIN), ("eval", EVAL)):
        (pictures / split).mkdir(parents=True)
        for i, image in enumerate(random_images(count, 16)):
            Image.fromarray(image).save(pictures / split / f"{i:03}.png")
    Tokenizer(random_tokenizer(ch_mult=(1,), bridge="XS/2-d1")).save_pretrained(folder / "start")  # codes that differ
    changes = CHANGES | {
        "data.train_dir": str(pictures / "train"),
        "data.eval_dir": str(pictures / "eval"),
        "init_from": str(folder / "start"),
    }
    config = fvq16k.get_config("smoke")
    config.update_from_flattened_dict(changes)
    one, two = folder / "one", folder / "two"
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        result = train(task_of(config), config, one)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    shutil.copytree(one / "checkpoints" / "step_2", two / "checkpoints" / "step_2")

    (folder / "sitecustomize.py").write_text(NOTE_PICTURES)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(folder),  # for sitecustomize.py
        "PICTURES": str(pictures),
        "PORT": str(free_port()),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    arguments = [f"--workdir={two}"]
    arguments += [f"--config.{name}={value}" for name, value in changes.items()]
    launch = ["launch/local.sh", "--dry-run", "--devices=4", "2", "configs/fvq16k.py:smoke", *arguments]
    lines = subprocess.run(launch, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    with concurrent.futures.ThreadPoolExecutor() as threads:
        ended = list(threads.map(lambda line: run_on_a_terminal(line, environment), lines.splitlines()))
    opened = [set((folder / f"pictures-opened-by-{index}").read_text().split()) for index in range(2)]
    return Runs(config, one, two, result, *map(list, zip(*ended, strict=True)), opened)


def test_both_end_well_and_the_first_says_so(runs):
    assert runs.codes == [0, 0], runs.terminals
    assert json.loads(runs.printed[0].splitlines()[-1])["step"] == 4
    assert '"step"' not in runs.printed[1]


def test_losses_and_codebook_are_those_of_one_process(runs):
    """Also saved by one and restored by two, and the other way round."""
    assert "restored step 2" in runs.terminals[0]
    ours, theirs = ([row for row in read_metrics(path) if "loss/total" in row][-2:] for path in (runs.two, runs.one))
    for step, our, their in zip((3, 4), ours, theirs, strict=True):
        assert our["step"] == their["step"] == step
        assert our["usage/window"] == their["usage/window"] > 0.25
        for name in ("loss/total", "loss/reconstruction", "loss/codebook", "grad_norm/tokenizer"):
            assert our[name] == pytest.approx(their[name], rel=1e-5), (name, step)

    step = make_step(runs.config, make_mesh(2, 4))
    states = []
    for path in (runs.two, runs.one):
        with Checkpoints(path) as checkpoints:
            states.append(checkpoints.restore(step.abstract(), 4).state)
    compared = []
    for (path, our), their in zip(jax.tree.leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        if path_name(path).endswith("/codebook"):  # others hold biases that Adam moves by the sign of rounding errors
            np.testing.assert_allclose(our, their, rtol=0, atol=1e-4 * np.abs(their).max(), err_msg=path_name(path))
            compared.append(path_name(path))
    assert len(compared) == 3  # the codebook and both moments


def test_each_process_reads_its_own_pictures_and_no_other(runs):
    assert not runs.opened[0] & runs.opened[1]
    for opened in runs.opened:
        assert len([name for name in opened if name.startswith("train")]) >= 2 * 8
    assert len([name for name in runs.opened[0] | runs.opened[1] if name.startswith("eval")]) == EVAL


def test_usage_is_that_of_all_processes(runs):
    summary = json.loads(runs.printed[0].splitlines()[-1])
    assert summary["tokens"] == EVAL * 16 * 16
    for name in ("tokens", "images", "usage"):
        assert summary[name] == runs.result.summary[name]
    for name in ("perplexity", "psnr", "ssim"):
        assert summary[name] == pytest.approx(runs.result.summary[name], rel=1e-4)  # the weights differ by rounding


def test_one_progress_bar_and_one_writer(runs):
    assert "4/4 [" in runs.terminals[0]
    assert "4/4" not in runs.terminals[1]
    assert len(list((runs.two / "tensorboard").iterdir())) == 1
