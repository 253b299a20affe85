"""The sweeps over generators: every point can run, and changes what its sweep is about."""

import pytest

from fvq_jax.sweep.points import make_points, read_sweep
from fvq_jax.tasks.generator.task import GeneratorTask
from tests.helpers.program import ROOT


def points(name, arg, tmp_path):
    file = f"{ROOT}/configs/generation/{name}.py:{arg}"
    module = __import__(f"configs.generation.{name}", fromlist=["get_config"])
    return make_points(module.get_config(arg), read_sweep(file), tmp_path)


@pytest.mark.parametrize(
    ("name", "arg", "count"), [("tokenizers", "from=DIR,steps=5", 3), ("guidance", "from=RUN,samples=20", 12)]
)
def test_every_point_can_run_and_is_another_one(name, arg, count, tmp_path):
    found = points(name, arg, tmp_path)
    assert len(found) == count
    assert not any(point.refused for point in found)
    assert len({str(point.overrides) for point in found}) == count
    assert all(point.config["task"] == GeneratorTask.main for point in found)


def test_arguments_are_taken(tmp_path):
    tokenizers = points("tokenizers", "from=DIR,steps=5", tmp_path)
    assert {point.config["steps"] for point in tokenizers} == {5}
    assert all(point.overrides["data.tokenizer"].startswith("DIR/") for point in tokenizers)
    guidance = points("guidance", "from=RUN,samples=20", tmp_path)
    assert {(point.config["init_from"], point.config["eval.samples"]) for point in guidance} == {("RUN", 20)}
