import json
import os

import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import json_text, make_folder, replace_whole, write_whole


def test_json_has_no_numbers_that_are_not_finite():
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": (True, None, "x", 3)}
    assert json.loads(json_text(value)) == {"a": None, "b": [1.5, None], "c": [True, None, "x", 3]}


def test_the_new_file_takes_the_place_of_the_old_when_it_is_whole(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with replace_whole(path) as unfinished:
        assert unfinished.parent == tmp_path
        assert unfinished.name.endswith(".unfinished")
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("before", [None, "old"])
def test_after_a_failure_all_is_as_before(tmp_path, before):
    path = tmp_path / "file.json"
    if before is not None:
        path.write_text(before)
    there = os.listdir(tmp_path)

    def write():
        with replace_whole(str(path)) as unfinished:
            unfinished.write_text("half of")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert os.listdir(tmp_path) == there
    assert before is None or path.read_text() == before


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")

    def write():
        with replace_whole(path):
            pass

    with pytest.raises(FileNotFoundError):
        write()
    assert path.read_text() == "old"


def test_folders_and_texts_that_cannot_be_written_are_one_line(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    write_whole(tmp_path / "a" / "b" / "c", "text")
    assert (tmp_path / "a" / "b" / "c").read_text() == "text"
    with pytest.raises(InputError, match=r"cannot write to .*c: File exists"):
        make_folder(tmp_path / "a" / "b" / "c")
    with pytest.raises(InputError, match=r"cannot write .*d: No such file"):
        write_whole(tmp_path / "none" / "d", "text")
