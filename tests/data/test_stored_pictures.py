import numpy as np
import pytest
from PIL import Image

from fvq_jax.data.stored_pictures import open_real, open_samples
from fvq_jax.runtime.errors import InputError


def save(folder, images, classes=("",)):
    for index, image in enumerate(images):
        (folder / classes[index % len(classes)]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / classes[index % len(classes)] / f"{index:03}.png")
    return folder


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


def test_a_folder_and_a_file_give_the_same_pictures(images, tmp_path):
    np.savez(tmp_path / "a.npz", images)
    for path in (save(tmp_path / "a", images), tmp_path / "a.npz"):
        samples = open_samples(path)
        assert (len(samples), samples.shape, samples.labels) == (11, (11, 8, 8, 3), None)
        batches = list(samples.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 3]
        np.testing.assert_array_equal(np.concatenate(batches), images)


def test_hosts_share_a_folder_batch_by_batch(images, tmp_path):
    samples = open_samples(save(tmp_path / "a", images))
    first, second = ([*samples.batches(2, part=part, parts=2)] for part in range(2))
    np.testing.assert_array_equal(first[1], images[4:6])
    np.testing.assert_array_equal(second[0], images[2:4])
    assert sum(map(len, first + second)) == 11


def test_folders_of_classes_are_mixed_and_keep_their_labels(images, tmp_path):
    """Pictures 0, 2, 4, ... are of class a, and a folder lists the classes one after the other."""
    samples = open_samples(save(tmp_path / "a", images, ("a", "b")))
    pictures = np.concatenate(list(samples.batches(3)))
    order = [next(i for i in range(11) if (images[i] == picture).all()) for picture in pictures]
    assert sorted(order) == list(range(11))
    np.testing.assert_array_equal(samples.labels, np.array(order) % 2)
    assert 0 < np.count_nonzero(np.diff(samples.labels)) > 2


def test_unreadable_files_are_left_out(images, tmp_path):
    folder = save(tmp_path / "a", np.tile(images, (10, 1, 1, 1)))
    (folder / "000.png").write_bytes(b"no picture")
    pictures = np.concatenate(list(open_samples(folder).batches(4)))
    np.testing.assert_array_equal(pictures, np.tile(images, (10, 1, 1, 1))[1:])


def test_real_pictures_are_cropped(images, tmp_path):
    wide = np.concatenate([images, images], axis=2)
    real = open_real(str(save(tmp_path / "a", wide)), 4)
    assert real.shape == (11, 4, 4, 3)
    assert next(real.batches(11)).shape == (11, 4, 4, 3)
    assert open_real("photos", 32).shape == (2048, 32, 32, 3)


def test_what_cannot_be_scored_is_refused(images, tmp_path):
    mixed = save(tmp_path / "a", images)
    Image.fromarray(images[0]).resize((9, 9)).save(mixed / "005.png")
    with pytest.raises(InputError, match="must have one size: one has 9 x 9 pixels, the first 8 x 8"):
        list(open_samples(mixed).batches(4))
    wide = save(tmp_path / "b", images[:, :4])
    with pytest.raises(InputError, match="has 8 x 4 pixels: samples must be square"):
        open_samples(wide)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"no picture in .* can be read"):
        open_samples(tmp_path / "c")
    with pytest.raises(InputError, match=r"cannot read pictures from .*none\.npz"):
        open_samples(tmp_path / "none.npz")
