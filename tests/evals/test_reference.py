import os

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.photos import PhotoSource
from fvq_jax.evals.reference import Reference, read_statistics
from fvq_jax.runtime.errors import InputError


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


def statistics(pooled=2048, spatial=2023):
    rng = np.random.default_rng(0)
    means = {"mu": rng.normal(size=pooled), "mu_s": rng.normal(size=spatial)}
    return means | {"sigma": np.eye(pooled), "sigma_s": 2 * np.eye(spatial)}


def test_adm_reference_files_are_read(tmp_path):
    arrays = statistics()
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    pooled, spatial = read_statistics(tmp_path / "adm.npz")
    for found, name in zip((*pooled, *spatial), ("mu", "sigma", "mu_s", "sigma_s"), strict=True):
        np.testing.assert_array_equal(found, arrays[name])
    np.savez(tmp_path / "fid.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    assert read_statistics(tmp_path / "fid.npz")[1] is None
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert read_statistics(tmp_path / "pictures.npz") is None


def test_wrong_statistics_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **statistics(pooled=64))
    with pytest.raises(InputError, match=r"mu and sigma must be \[2048\] and .*, not \[64\] and \[64, 64\]"):
        read_statistics(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.zeros(2048))
    with pytest.raises(InputError, match=r"b\.npz has mu but no sigma"):
        read_statistics(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"PK no archive")
    np.save(tmp_path / "d.npy", np.zeros(2048))
    (tmp_path / "d.npy").rename(tmp_path / "d.npz")
    for name in ("c.npz", "d.npz", "none.npz"):
        with pytest.raises(InputError, match=f"cannot read .*{name}"):
            read_statistics(tmp_path / name)
