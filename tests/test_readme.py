import pathlib
import re

import numpy as np

from fvq_jax.inference.tokenizer import Tokenizer
from tests.helpers.random_tokenizer import random_tokenizer

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_on_a_tokenizer(tmp_path, monkeypatch):
    """Exports to both PyTorch layouts, reads back, and gets the same codes and pictures."""
    tokenizer = Tokenizer(random_tokenizer(ch_mult=(1, 1, 1, 1), bridge="XS/2"))
    tokenizer.save_pretrained(tmp_path / "runs" / "quickstart")
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
