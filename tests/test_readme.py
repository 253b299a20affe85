import pathlib
import re

import numpy as np

from fvq_jax.tasks import task_of
from fvq_jax.training.loop import train
from tests.helpers.tiny import tiny_config

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_on_a_workdir(tmp_path, monkeypatch):
    """Exports to both PyTorch layouts, reads back, and gets the same codes and pictures."""
    config = tiny_config(steps=2, **{"tokenizer.ch_mult": (1, 1, 1, 1)})
    train(task_of(config), config, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["codes"].shape == (64, 4, 4)
    assert np.isfinite(names["images"]).all()


def test_every_file_that_is_named_exists():
    root = pathlib.Path(__file__).parents[1]
    for path in re.findall(r"\]\(((?:docs|fvq_jax|configs)/[^)#]+)", README):
        assert (root / path).exists(), path
    for path in re.findall(r"configs/\w+\.py", README):
        assert (root / path).exists(), path
