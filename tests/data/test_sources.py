import os

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data import sources
from fvq_jax.data.sources import FolderSource, PhotoSource, make_source
from fvq_jax.errors import InputError


def save(path, colour=(1, 2, 3), size=(4, 3), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def numbered_pixels(path):
    """The picture at `path` with every pixel replaced by its own position, as a 24-bit number."""
    with Image.open(path) as image:
        width, height = image.size
    number = np.arange(height * width).reshape(height, width)
    return np.stack([number >> 16, number >> 8 & 255, number & 255], axis=-1).astype(np.uint8)


def positions(image):
    return image.astype(np.int64) @ np.array([65536, 256, 1])


@pytest.mark.parametrize(("image_size", "photos"), [(16, 10), (32, 10), (128, 10), (256, 9)])
def test_no_photo_pixel_is_in_both_splits(monkeypatch, image_size, photos):
    monkeypatch.setattr(sources, "read_image", numbered_pixels)
    train, evaluation = PhotoSource(image_size, "train"), PhotoSource(image_size, "eval", 4096)
    seen = {"train": np.zeros((photos, 1 << 21), bool), "eval": np.zeros((photos, 1 << 21), bool)}
    for split, source in (("train", train), ("eval", evaluation)):
        for index in range(len(source)):
            record = source[index]
            seen[split][record["label"], positions(record["image"]).ravel()] = True
            assert record["corrupt"] == -1
    assert not (seen["train"] & seen["eval"]).any()
    assert seen["train"].any(axis=1).all()
    assert seen["eval"].any(axis=1).all()
    if image_size == 32:
        share = seen["eval"].sum() / (seen["eval"] | seen["train"]).sum()
        assert 0.15 < share < 0.25


def test_photos_train_on_photographs_equally_and_on_tiles_evenly():
    source = PhotoSource(32, "train")
    assert len(source) == 7200
    records = [source[index] for index in range(len(source))]
    assert all(record["image"].shape == (64, 64, 3) for record in records)
    labels = np.array([record["label"] for record in records])
    assert (np.bincount(labels) == len(source) // 10).all()
    for label in range(10):
        tiles = [record["image"].tobytes() for record in records if record["label"] == label]
        counts = [tiles.count(tile) for tile in set(tiles)]
        assert max(counts) - min(counts) <= 1


def test_photo_evaluation_set_is_fixed_and_a_smaller_one_its_beginning():
    source, again, smaller = (PhotoSource(32, "eval", count) for count in (60, 60, 20))
    assert (len(source), len(smaller)) == (60, 20)
    crops = [source[index]["image"] for index in range(60)]
    assert len({crop.tobytes() for crop in crops}) > 50
    for index, crop in enumerate(crops):
        assert crop.shape == (32, 32, 3)
        np.testing.assert_array_equal(crop, again[index]["image"])
        if index < 20:
            np.testing.assert_array_equal(crop, smaller[index]["image"])


def test_photos_are_distinct_colour_photographs():
    source = PhotoSource(32, "train")
    names = [source.name(index) for index in range(10)]
    assert len(set(names)) == 10
    assert "motorcycle_right.png" not in names
    for index in range(10):
        assert source[index]["image"].std(axis=-1).mean() > 0.5


def test_photos_refuse_a_size_that_leaves_nothing():
    assert len(PhotoSource(500, "eval", 3)) == 3
    with pytest.raises(InputError, match=r"data\.image_size=501 .* at most 500 "):
        PhotoSource(501, "train")


def test_photos_name_a_missing_package(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install scikit-image"):
        PhotoSource(32, "train")


def test_folder_order_and_classes(tmp_path):
    for name in ("dog/b.PNG", "dog/a/z.jpg", "cat/x.webp", "cat/deep/er/y.jpeg", "ant/1.png"):
        save(tmp_path / name)
    for name in ("dog/notes.txt", "cat/._x.jpg", ".cache/1.png", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not a picture")
    source = FolderSource(tmp_path)
    names = [os.path.relpath(source.name(index), tmp_path) for index in range(len(source))]
    assert names == ["ant/1.png", "cat/deep/er/y.jpeg", "cat/x.webp", "dog/a/z.jpg", "dog/b.PNG"]
    assert source.classes == ["ant", "cat", "dog"]
    assert [int(source[index]["label"]) for index in range(len(source))] == [0, 1, 1, 2, 2]
    assert source[0]["image"].shape == (3, 4, 3)
    assert source[0]["label"].dtype == np.int32


def test_folder_without_classes_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.logging, "warning", lambda *_: pytest.fail("nothing to warn about"))
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    source = FolderSource(tmp_path)
    assert [os.path.basename(source.name(index)) for index in range(2)] == ["a.png", "b.png"]
    assert [int(source[index]["label"]) for index in range(2)] == [0, 0]


def test_pictures_beside_class_folders_become_class_0_with_a_warning(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(sources.logging, "warning", lambda text, *args: messages.append(text % args))
    save(tmp_path / "cat/1.png")
    save(tmp_path / "preview.png")
    source = FolderSource(tmp_path)
    assert {source.name(i): int(source[i]["label"]) for i in range(2)} == {
        str(tmp_path / "preview.png"): 0,
        str(tmp_path / "cat/1.png"): 1,
    }
    assert len(messages) == 1
    assert "'preview.png'" in messages[0]


def test_folder_follows_links_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere/1.png")
    save(tmp_path / "root/cat/2.png")
    (tmp_path / "root/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/cat/up").symlink_to(tmp_path / "root")
    source = FolderSource(tmp_path / "root")
    assert [os.path.basename(source.name(index)) for index in range(len(source))] == ["2.png", "1.png"]


def test_folder_refuses_what_is_missing_empty_or_closed(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        FolderSource(tmp_path / "nowhere")
    save(tmp_path / "file.png")
    with pytest.raises(InputError, match="not a folder"):
        FolderSource(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty' holds no file .*\.jpg, \.jpeg, \.png, \.webp"):
        FolderSource(tmp_path / "empty")

    def closed(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"cannot read folder .*empty': Permission denied"):
        FolderSource(tmp_path / "empty")


def test_a_format_no_one_asked_for_is_not_decoded(tmp_path):
    save(tmp_path / "a.png", format="TIFF")
    save(tmp_path / "b.png")
    assert FolderSource(tmp_path)[0]["corrupt"] == 0


def write_damaged(path, damage):
    save(path, size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "garbage": b"\x00\xff" * 40, "truncated": whole[: len(whole) // 2]}[damage])


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated"])
def test_a_damaged_file_is_replaced_by_the_next_readable_one(tmp_path, damage, ending):
    save(tmp_path / "0.png", (10, 10, 10))
    save(tmp_path / "1.png", (11, 11, 11))
    write_damaged(tmp_path / f"2.{ending}", damage)
    write_damaged(tmp_path / f"3.{ending}", damage)
    source = FolderSource(tmp_path)
    assert [int(source[index]["image"][0, 0, 0]) for index in range(4)] == [10, 11, 10, 10]
    assert [int(source[index]["corrupt"]) for index in range(4)] == [-1, -1, 2, 3]


def test_a_decompression_bomb_counts_as_damaged(tmp_path, monkeypatch):
    save(tmp_path / "a.png", size=(100, 100))
    save(tmp_path / "b.png", size=(5, 5))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    record = FolderSource(tmp_path)[0]
    assert record["image"].shape == (5, 5, 3)
    assert record["corrupt"] == 0


def test_nothing_readable_is_an_error(tmp_path):
    write_damaged(tmp_path / "a.png", "garbage")
    write_damaged(tmp_path / "b.png", "empty")
    with pytest.raises(InputError, match="none of the 2 files"):
        FolderSource(tmp_path)[1]


def test_unusual_files_decode_to_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "b.png", transparency=1)
    Image.new("LA", (8, 8), (9, 0)).save(tmp_path / "c.png")
    Image.fromarray(np.full((8, 8), 25700, np.uint16)).save(tmp_path / "d.png")
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (40, 200)]
    frames[0].save(tmp_path / "e.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("RGB", (8, 8), (7, 8, 9)).save(tmp_path / "f.png", transparency=(7, 8, 9))
    Image.new("RGB", (8, 8), (7, 8, 9)).save(tmp_path / "g.jpg", format="PNG")
    white = (255, 255, 255)
    expected = [(255, 0, 0), white, white, (100, 100, 100), (40, 40, 40), white, (7, 8, 9)]
    source = FolderSource(tmp_path)
    for index, colour in enumerate(expected):
        record = source[index]
        assert record["corrupt"] == -1, source.name(index)
        np.testing.assert_allclose(record["image"], np.broadcast_to(colour, (8, 8, 3)), atol=2)


def test_exif_rotation_of_a_file_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 8
    image.save(tmp_path / "a.jpg", exif=exif)
    assert FolderSource(tmp_path)[0]["image"].shape == (20, 10, 3)


def test_make_source(tmp_path):
    save(tmp_path / "train/cat/1.png")
    save(tmp_path / "eval/1.png")
    save(tmp_path / "eval/2.png")
    fields = {
        "image_size": 32,
        "train_dir": str(tmp_path / "train"),
        "eval_dir": str(tmp_path / "eval"),
        "eval_images": 7,
    }
    assert len(make_source("folder", "train", **fields)) == 1
    assert len(make_source("folder", "eval", **fields)) == 2
    assert len(make_source("photos", "train", **fields)) == 7200
    assert len(make_source("photos", "eval", **fields)) == 7
    assert len(make_source("photos", "eval", **fields | {"eval_images": 0})) == 2048
    with pytest.raises(InputError, match=r"needs data\.eval_dir"):
        make_source("folder", "eval", **fields | {"eval_dir": ""})
    with pytest.raises(InputError, match="'tfds' is unknown: use 'photos' or 'folder'"):
        make_source("tfds", "train", **fields)
    with pytest.raises(InputError, match="nowhere"):
        make_source("folder", "train", **fields | {"train_dir": "nowhere"})
