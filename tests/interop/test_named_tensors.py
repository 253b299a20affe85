import argparse
import datetime
import pathlib

import numpy as np
import pytest

from fvq_jax.interop.named_tensors import read_checkpoint_file


def test_facts_are_the_plain_values_among_the_arguments(tmp_path):
    """An object says nothing: taken for text, it would be a wrong answer."""
    torch = pytest.importorskip("torch")
    plain = {"codebook_l2_norm": np.bool_(True), "depth": np.int64(4), "rate": 0.5, "scales": [1, 2], "name": "x"}
    objects = {"dtype": torch.float32, "device": torch.device("cpu"), "date": datetime.date(2024, 1, 2), "none": None}
    args = argparse.Namespace(**plain, **objects, data=pathlib.PosixPath("a/b"))
    torch.save({"model": {"w": torch.ones(2)}, "args": args}, tmp_path / "x.pt")
    tensors, facts = read_checkpoint_file(tmp_path / "x.pt")
    assert list(tensors) == ["model.w"]
    assert facts == {"codebook_l2_norm": True, "depth": 4, "rate": 0.5, "scales": [1, 2], "name": "x", "data": "a/b"}
    assert facts["codebook_l2_norm"] is True
