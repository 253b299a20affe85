import numpy as np
import pytest

from fvq_jax.data.sample_folder import SampleFolder
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import UNFINISHED

SETTINGS = {"seed": 0, "classes": [1, 2]}


def pictures(first, count):
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)


def test_parts_come_back_in_order_and_only_up_to_a_gap(tmp_path):
    folder = SampleFolder(tmp_path / "out", SETTINGS)
    assert folder.done == 0
    for first, count in ((0, 3), (3, 4), (7, 1), (8, 2)):
        folder.add(pictures(first, count))
    again = SampleFolder(tmp_path / "out", SETTINGS)
    assert again.done == 10
    assert [start for start, _ in again.parts()] == [0, 3, 7, 8]
    np.testing.assert_array_equal(np.concatenate([part for _, part in again.parts()]), pictures(0, 10))
    (tmp_path / "out" / "parts" / "00000007-00000008.npy").unlink()
    assert again.done == 7
    (tmp_path / "out" / "parts" / "00000003-00000007.npy.12.unfinished").write_bytes(b"half")
    assert again.done == 7


def test_samples_of_other_settings_are_refused(tmp_path):
    SampleFolder(tmp_path, SETTINGS)
    with pytest.raises(InputError, match=r"made differently: seed is 0 there and 1 here; use another folder"):
        SampleFolder(tmp_path, {**SETTINGS, "seed": 1})


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / f"sampling.json.7{UNFINISHED}").touch()  # left by a process that was killed
    SampleFolder(tmp_path, SETTINGS)
    (tmp_path / "sampling.json").write_text("[]")
    with pytest.raises(InputError, match="does not hold names and values"):
        SampleFolder(tmp_path, SETTINGS)
    (tmp_path / "sampling.json").rename(tmp_path / "config.json")
    with pytest.raises(InputError, match="holds something else"):
        SampleFolder(tmp_path, SETTINGS)
    assert not (tmp_path / "sampling.json").exists()


def test_a_damaged_part_is_named(tmp_path):
    folder = SampleFolder(tmp_path, SETTINGS)
    folder.add(pictures(0, 3))
    path = tmp_path / "parts" / "00000000-00000003.npy"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"00000003\.npy is damaged: remove it, and start again"):
        list(folder.parts())


@pytest.mark.parametrize("keep", [False, True])
def test_the_result_is_noted_and_parts_are_removed_unless_they_are_all_there_is(keep, tmp_path):
    folder = SampleFolder(tmp_path, SETTINGS)
    folder.add(pictures(0, 3))
    folder.finish({"samples": 3}, keep_parts=keep)
    assert SampleFolder(tmp_path, SETTINGS).result == {"samples": 3}
    assert (tmp_path / "parts").exists() == keep


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/out: Not a directory"):
        SampleFolder(tmp_path / "file" / "out", SETTINGS)
