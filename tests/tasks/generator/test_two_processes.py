"""Two processes train a generator as one does: same batches, losses, evaluation."""

import json

import numpy as np
import pytest

from configs import llamagen
from fvq_jax.tasks import task_of
from fvq_jax.training.loop import train
from fvq_jax.training.metric_files import read_metrics
from tests.helpers.tiny_generator import write_splits
from tests.helpers.two_hosts import free_port, start_host

ARG = "smoke,vocab=64"
CHANGES = {
    "steps": 3,
    "batch_size": 16,
    "eval.batch_size": 16,
    "eval.images": 20,
    "generator.classes": 4,
    "generator.dtype": "float32",
    "mesh.codebook": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("codes"))


@pytest.mark.slow
def test_two_processes_do_what_one_does(folder, monkeypatch):
    """Two devices each; the one process has eight."""
    config = llamagen.get_config(ARG)
    data = {"data.train_dir": f"{folder}/train", "data.eval_dir": f"{folder}/eval"}
    config.update_from_flattened_dict(CHANGES | data | {"generator.grid": (4, 4)})
    one = train(task_of(config), config, folder / "one").summary

    flags = [f"--config.{name}={value}" for name, value in (CHANGES | data).items()]
    command = [
        *("-m", "fvq_jax.main", "--distributed", f"--config=configs/llamagen.py:{ARG}"),
        *("--config.generator.grid=4,4", f"--workdir={folder / 'two'}", *flags),
    ]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0")
    port = free_port()
    hosts = [start_host(index, 2, port, *command) for index in range(2)]
    ends = [host.communicate(timeout=600) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], ends
    two = json.loads(ends[0][0].splitlines()[-1])
    assert "nll_bits" not in ends[1][0]  # the first one prints the result
    for name in ("nll_bits", "unigram_bits", "bigram_bits", "accuracy", "images", "codes"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    losses = [
        [row["loss/total"] for row in read_metrics(folder / run) if "loss/total" in row] for run in ("one", "two")
    ]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert (folder / "two" / "provenance.json").read_text() == (folder / "one" / "provenance.json").read_text()
