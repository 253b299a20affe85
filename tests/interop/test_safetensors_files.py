import json
import os

import numpy as np
import pytest
import safetensors.numpy

from fvq_jax.interop.named_tensors import read_checkpoint_file
from fvq_jax.interop.torch_file import read_tensors, tensor_names
from fvq_jax.runtime.errors import InputError

TENSORS = {name: np.full(3, number, np.float32) for number, name in enumerate("abcd")}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLACES = {"a": FIRST, "b": SECOND, "c": FIRST, "d": SECOND}  # in turn, as no program writes it


def write_parts(folder, places=PLACES):
    """The tensors in two files; returns the path of an index that says `places`."""
    for part in (FIRST, SECOND):
        mine = {name: value for name, value in TENSORS.items() if PLACES[name] == part}
        safetensors.numpy.save_file(mine, folder / part, {"codebook_l2_norm": "true", "part": part})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": places}))
    return index


def test_the_parts_that_an_index_names_are_one_file(tmp_path):
    index, seen = write_parts(tmp_path), []

    def track(names):
        for name in names:
            seen.append(name)
            yield name

    tensors, facts = read_checkpoint_file(index, track)
    assert set(tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], value, strict=True)
    assert sorted(seen) == sorted(tensor_names(index)) == list("abcd")
    assert facts == {"codebook_l2_norm": True, "part": SECOND}


def test_only_what_the_index_names_is_read(tmp_path):
    assert list(read_tensors(write_parts(tmp_path, {"b": SECOND}))) == ["b"]


@pytest.mark.parametrize(
    "part",
    ["../x.safetensors", "below/x.safetensors", "/etc/x.safetensors", r"..\x.safetensors", "x.bin", "", 3, None, ["x"]],
)
def test_an_index_leads_nowhere_else(part, tmp_path):
    with pytest.raises(InputError, match=r"index\.json places tensors in .*, which is not the name of a \.safetensors"):
        read_tensors(write_parts(tmp_path, {"a": FIRST, "b": part}))


def test_a_missing_part_is_named(tmp_path):
    index = write_parts(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(InputError, match=rf"{SECOND} is missing: .*index\.json names 2 files, and all"):
        read_tensors(index)


def test_a_damaged_part_is_named(tmp_path):
    index = write_parts(tmp_path)
    os.truncate(tmp_path / SECOND, 100)
    with pytest.raises(InputError, match=rf"{SECOND} is damaged"):
        read_tensors(index)


def test_tensors_that_are_not_where_the_index_says_are_named(tmp_path):
    index = write_parts(tmp_path, {**PLACES, "b": FIRST, **dict.fromkeys("vwxyz", FIRST)})
    with pytest.raises(InputError, match=rf"{FIRST} lacks b, v, w, x and 2 more, which model.* do not belong together"):
        read_tensors(index)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {}}'])
def test_what_is_no_index_is_refused_in_one_line(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(InputError, match=r"^[^\n]*(index\.json is|index\.json holds no tensors)[^\n]*$"):
        read_tensors(index)
