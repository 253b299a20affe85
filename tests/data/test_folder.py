import os
import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data import folder
from fvq_jax.data.decode import open_stored
from fvq_jax.data.folder import FolderSource
from fvq_jax.runtime.errors import InputError
from tests.helpers.pictures import write_pictures


def test_folder_order_and_classes(tmp_path):
    write_pictures(tmp_path, ("dog/b.PNG", "dog/a/z.jpg", "cat/x.webp", "cat/deep/er/y.jpeg", "ant/1.png"))
    for name in ("dog/notes.txt", "cat/._x.jpg", ".cache/1.png", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not a picture")
    source = FolderSource(tmp_path)
    names = [os.path.relpath(source.name(index), tmp_path) for index in range(len(source))]
    assert names == ["ant/1.png", "cat/deep/er/y.jpeg", "cat/x.webp", "dog/a/z.jpg", "dog/b.PNG"]
    assert source.classes == ["ant", "cat", "dog"]
    assert [int(source[index]["label"]) for index in range(len(source))] == [0, 1, 1, 2, 2]
    assert [source.label(index) for index in range(len(source))] == [0, 1, 1, 2, 2]
    assert [source.relative_name(index) for index in range(len(source))] == names
    assert source[0]["label"].dtype == np.int32


def test_a_record_is_the_file_as_it_is(tmp_path):
    (path,) = write_pictures(tmp_path, ("a.jpg",))
    assert FolderSource(tmp_path)[0]["image"] == path.read_bytes()


def test_folder_without_classes_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.logging, "warning", lambda *_: pytest.fail("nothing to warn about"))
    write_pictures(tmp_path, ("b.png", "a.png"))
    source = FolderSource(tmp_path)
    assert [os.path.basename(source.name(index)) for index in range(2)] == ["a.png", "b.png"]
    assert [int(source[index]["label"]) for index in range(2)] == [0, 0]


def test_a_single_picture_stands_for_a_folder_of_it(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    source = FolderSource(tmp_path / "b.png")
    assert (len(source), source.relative_name(0), source.classes) == (1, "b.png", [""])
    assert source[0]["image"] == b"b.png"


def test_pictures_beside_class_folders_become_class_0_with_a_warning(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(folder.logging, "warning", lambda text, *args: messages.append(text % args))
    write_pictures(tmp_path, ("cat/1.png", "preview.png"))
    source = FolderSource(tmp_path)
    assert {source.name(i): int(source[i]["label"]) for i in range(2)} == {
        str(tmp_path / "preview.png"): 0,
        str(tmp_path / "cat/1.png"): 1,
    }
    assert len(messages) == 1
    assert "'preview.png'" in messages[0]


ALSO = ("a.txt", "b/c.TXT", "d.tiff", "e", "f.2024", "b/g.md", "h.csv", "i.html", "j.log", "k.log", ".hidden", "l.x y")


def test_what_is_left_out_is_counted_by_its_ending(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(folder.logging, "warning", lambda text, *args: messages.append(text % args))
    (tmp_path / "b").mkdir()
    for name in ALSO:
        (tmp_path / name).touch()
    found = "no ending 3, .txt 2, .log 2, .md 1, .tiff 1, more 2"
    with pytest.raises(InputError, match=rf"\.gif, but 11 others: {found}$"):
        FolderSource(tmp_path)
    write_pictures(tmp_path, ("a.png",))
    assert len(FolderSource(tmp_path)) == 1
    (message,) = messages
    assert message.startswith(f"{tmp_path}: leaves out 11 files: {found}; pictures are .jpg .jpeg .jfif")


@pytest.mark.parametrize(("name", "kind"), [("a.JFIF", "JPEG"), ("a.jpe", "JPEG"), ("a.bmp", "BMP"), ("a.gif", "GIF")])
def test_every_format_that_can_be_decoded_is_taken(tmp_path, name, kind):
    Image.new("RGB", (3, 2), "red").save(tmp_path / name, kind)
    assert open_stored(FolderSource(tmp_path)[0]["image"]).size == (3, 2)


def test_folder_follows_links_but_not_in_circles(tmp_path):
    write_pictures(tmp_path, ("elsewhere/1.png", "root/cat/2.png"))
    (tmp_path / "root/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/cat/up").symlink_to(tmp_path / "root")
    source = FolderSource(tmp_path / "root")
    assert [os.path.basename(source.name(index)) for index in range(len(source))] == ["2.png", "1.png"]


def test_links_to_each_other_end_where_they_come_back(tmp_path):
    write_pictures(tmp_path, ("a/1.png", "b/2.png"))
    (tmp_path / "a/to").symlink_to(tmp_path / "b")
    (tmp_path / "b/to").symlink_to(tmp_path / "a")
    source = FolderSource(tmp_path)
    names = [source.relative_name(index) for index in range(len(source))]
    assert names == ["a/1.png", "a/to/2.png", "b/2.png", "b/to/1.png"]


def test_a_link_to_itself_leads_nowhere(tmp_path):
    write_pictures(tmp_path, ("a.png",))
    for name in ("self", "self.png"):
        (tmp_path / name).symlink_to(name)
    source = FolderSource(tmp_path)
    assert [source.relative_name(index) for index in range(len(source))] == ["a.png", "self.png"]


def test_folder_refuses_what_is_missing_empty_or_closed(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        FolderSource(tmp_path / "nowhere")
    write_pictures(tmp_path, ("file.png",))
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(InputError, match="not a folder"):
        FolderSource(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty' holds no file that ends in one of \.jpg, \.jpeg, [^:]*\.gif$"):
        FolderSource(tmp_path / "empty")

    def closed(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"cannot read folder .*empty': Permission denied"):
        FolderSource(tmp_path / "empty")


@pytest.mark.parametrize("beside", [(), ("b-beside.png", "zz.png")])
def test_order_is_that_of_the_parts_of_the_paths_and_classes_that_of_names(tmp_path, beside):
    """A folder `b` comes before `b-`, though `b-/1.png` sorts before `b/1.png` as text."""
    names = ("b-/1.png", "b/1.png", "b/1/x.png", "B/y.png", "é/1.png", *beside)
    write_pictures(tmp_path, names)
    source = FolderSource(tmp_path)
    listed = [source.relative_name(index) for index in range(len(source))]
    assert listed == sorted(names, key=lambda name: name.split("/"))
    classes = sorted({name.split("/")[0] if "/" in name else "" for name in names})
    assert source.classes == classes
    folders = [name.split("/")[0] if "/" in name else "" for name in listed]
    assert [source.label(index) for index in range(len(source))] == [classes.index(name) for name in folders]


def test_names_that_are_no_text_can_be_read(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    (path,) = write_pictures(tmp_path, ("a.png",))
    os.rename(path, name)
    source = FolderSource(tmp_path)
    assert os.fsencode(source.name(0)) == name
    assert len(source[0]["image"]) > 0
    assert source.fingerprint().startswith("1 files")


def test_a_link_to_nothing_is_listed_and_not_left_out_in_silence(tmp_path):
    write_pictures(tmp_path, ("a.png",))
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    source = FolderSource(tmp_path)
    assert len(source) == 2
    with pytest.raises(FileNotFoundError):
        source[1]


def test_the_fingerprint_covers_names_and_sizes_and_not_the_place(tmp_path):
    paths = write_pictures(tmp_path / "here", ("cat/1.png", "dog/2.png"))
    write_pictures(tmp_path / "there", ("cat/1.png", "dog/2.png"))
    before = FolderSource(tmp_path / "here").fingerprint()
    assert before.startswith("2 files, names and sizes ")
    assert FolderSource(tmp_path / "there").fingerprint() == before
    content = paths[0].read_bytes()
    paths[0].write_bytes(content + b"x")
    changed = FolderSource(tmp_path / "here").fingerprint()
    paths[0].write_bytes(content)
    assert FolderSource(tmp_path / "here").fingerprint() == before
    paths[0].rename(paths[0].with_name("3.png"))
    assert len({before, changed, FolderSource(tmp_path / "here").fingerprint()}) == 3


def test_many_names_take_little_memory(tmp_path, monkeypatch):
    """ImageNet has 1.3 million; the names here have 30 characters, too. Nothing is sent to workers but the names."""
    count = 5_000
    listing = ((f"n{number // 1000:08}/n{number // 1000:08}_{number:05}.JPEG", 1) for number in range(count))
    monkeypatch.setattr(folder, "_image_files", lambda root, others: listing)
    tracemalloc.start()
    source = FolderSource(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.relative_name(count - 1) == "n00000004/n00000004_04999.JPEG"
    assert len(source.classes) == 5
    assert peak / count < 120
    assert len(pickle.dumps(source)) / count < 45


def test_a_fingerprint_without_names_knows_the_rest_alone(tmp_path):
    paths = write_pictures(tmp_path, ("a.png", "b.png", "cat/c.png"))
    bad = ["b.png", "cat/c.png"]
    before = FolderSource(tmp_path).fingerprint_without(bad)
    paths[1].unlink()
    paths[2].write_bytes(b"repaired")
    assert FolderSource(tmp_path).fingerprint_without(bad) == before
    paths[0].write_bytes(b"another")
    assert FolderSource(tmp_path).fingerprint_without(bad) != before
    assert FolderSource(tmp_path).fingerprint_without([]) == FolderSource(tmp_path).fingerprint()
