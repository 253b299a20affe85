import os

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.photos import PhotoSource
from fvq_jax.evals.reference import Reference


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


@pytest.fixture
def reference(tmp_path, folder):
    """Makes the reference of the folder, with changes."""
    (tmp_path / "weights").write_bytes(b"weights")
    what = {"protocol": "direct", "size": 16, "images": 0, "weights": tmp_path / "weights"}
    return lambda source=None, **changes: Reference.of(
        tmp_path / "cache", source or FolderSource(folder), **what | changes
    )


def test_everything_that_changes_the_statistics_changes_the_file(reference, folder, tmp_path):
    paths = [reference().path]
    assert reference().path == paths[0]
    (tmp_path / "others").write_bytes(b"other weights")
    for changes in ({"protocol": "published"}, {"size": 32}, {"images": 1}, {"weights": tmp_path / "others"}):
        paths.append(reference(**changes).path)
    paths.append(reference(PhotoSource(16, "eval", 8)).path)
    os.utime(folder / "b.png", ns=(1, 1))  # as if replaced by a picture of the same name and size
    paths.append(reference().path)
    (folder / "b.png").rename(folder / "c.png")
    paths.append(reference().path)
    assert len(set(paths)) == len(paths)


def test_crops_of_another_picture_of_the_same_name_are_others(reference, folder):
    crops = RandomCrops(FolderSource(folder), 8, 4)
    before = reference(crops).path
    os.utime(folder / "b.png", ns=(1, 1))
    assert reference(crops).path != before


def test_a_picture_that_has_gone_is_left_to_the_evaluation(reference, folder):
    (folder / "c.png").symlink_to(folder / "nowhere.png")
    source = FolderSource(folder)
    before = reference(source).path
    (folder / "b.png").unlink()
    assert reference(source).path != before


def test_moments_come_back_as_they_were(reference):
    moments = np.arange(3.0) / 7, np.eye(3) / 3
    assert reference().load() is None
    reference().save(moments)
    for actual, expected in zip(reference().load(), moments, strict=True):
        np.testing.assert_array_equal(actual, expected, strict=True)
    assert [path.suffix for path in reference().path.parent.iterdir()] == [".npz"]


def test_a_damaged_file_is_as_good_as_none(reference, caplog):
    reference().save((np.zeros(300), np.zeros((300, 300))))
    with open(reference().path, "r+b") as file:
        file.truncate(1000)
    assert reference().load() is None
    assert "is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_costs_no_result(reference, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    reference().save((np.zeros(3), np.eye(3)))
    assert "cannot write" in caplog.text
