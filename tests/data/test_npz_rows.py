import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvq_jax.data.npz_rows import CodeReader, CodeWriter, ImageReader, ImageWriter
from fvq_jax.runtime.errors import InputError

ROWS = np.random.default_rng(0).integers(0, 2**18, (7, 2, 3)).astype(np.int32)
NAMES = ["a.png", "b/c.jpg", "ünïcode.png", "d", "e" * 40, "f", "g"]


def write(path, rows=ROWS, names=NAMES, parts=((0, 3), (3, 4), (4, 7))):
    with CodeWriter(path, rows.shape[1:]) as writer:
        for start, stop in parts:
            writer.write(rows[start:stop], names[start:stop])
        assert not path.exists()
    return path


def test_numpy_reads_what_was_written_in_parts(tmp_path):
    path = write(tmp_path / "new" / "x.npz")
    with np.load(path) as file:
        assert sorted(file.files) == ["codes", "names"]
        np.testing.assert_array_equal(file["codes"], ROWS, strict=True)
        assert file["names"].tolist() == NAMES
    assert [file.name for file in path.parent.iterdir()] == ["x.npz"]


@settings(deadline=None, max_examples=10, derandomize=True)
@given(size=st.integers(1, 9))
def test_it_is_read_back_in_parts_of_any_size(size, tmp_path_factory):
    reader = CodeReader(write(tmp_path_factory.mktemp("codes") / "x.npz"))
    assert reader.shape == (7, 2, 3)
    parts = list(reader.batches(size))
    assert [len(rows) for rows, _ in parts] == [min(size, 7 - start) for start in range(0, 7, size)]
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in parts]), ROWS)
    assert [name for _, names in parts for name in names] == NAMES


def test_files_of_numpy_itself_are_read(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", codes=ROWS.astype(np.int64), names=np.array(NAMES))
        rows, names = next(CodeReader(tmp_path / "x.npz").batches(10))
        np.testing.assert_array_equal(rows, ROWS)
        assert names == NAMES


def test_codes_without_names_are_numbered(tmp_path):
    np.savez(tmp_path / "x.npz", codes=ROWS)
    rows, names = zip(*CodeReader(tmp_path / "x.npz").batches(4), strict=True)
    np.testing.assert_array_equal(np.concatenate(rows), ROWS)
    assert sum(names, []) == [f"{number:05d}" for number in range(len(ROWS))]  # noqa: RUF017


def test_an_exception_leaves_no_file(tmp_path):
    def write_too_few_names():
        with CodeWriter(tmp_path / "x.npz", (2, 3)) as writer:
            writer.write(ROWS, NAMES)
            writer.write(ROWS, NAMES[:6])

    with pytest.raises(ValueError, match="do not fit 6 names"):
        write_too_few_names()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/x\.npz"):
        CodeWriter(tmp_path / "file" / "x.npz", (2, 3))


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(InputError, match=r"cannot read codes from .*x\.npz: No such file"):
        CodeReader(path)
    for arrays in (
        {"codes": ROWS.astype(np.float32), "names": np.array(NAMES)},
        {"codes": ROWS, "names": np.arange(7)},
        {"codes": ROWS, "names": np.array(NAMES[:6])},
        {"codes": ROWS[:2, 0, 0], "names": np.array(NAMES[:2])},
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=r"x\.npz is no file of codes: it needs"):
            CodeReader(path)
    np.savez(path, names=np.array(NAMES))
    with pytest.raises(InputError, match=r"cannot read codes from .*codes\.npy"):
        CodeReader(path)
    path.write_text("no zip file")
    with pytest.raises(InputError, match=r"cannot read codes from .*x\.npz: File is not a zip file"):
        CodeReader(path)


@pytest.mark.parametrize("repeats", [1, 1000])
def test_damage_inside_is_noticed(repeats, tmp_path):
    """On opening a small file, which is read at once, or on the way through a larger one."""
    path = write(tmp_path / "x.npz", ROWS.repeat(repeats, axis=0), NAMES * repeats, parts=((0, 7 * repeats),))
    content = bytearray(path.read_bytes())
    content[content.index(ROWS[:1].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz( is damaged)?: Bad CRC-32"):
        list(CodeReader(path).batches(3))


def test_members_that_end_early_are_noticed(tmp_path):
    path = write(tmp_path / "x.npz")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:-8])
    with pytest.raises(InputError, match=r"x\.npz is damaged: it ends early"):
        list(CodeReader(path).batches(3))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_are_read_in_parts(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 5, 4, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", images, np.arange(11))
    reader = ImageReader(tmp_path / "a.npz")
    assert (len(reader), reader.shape) == (11, (11, 5, 4, 3))
    np.testing.assert_array_equal(reader.labels, np.arange(11))
    batches = list(reader.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), images)
    halves = [list(reader.batches(2, part=part, parts=2)) for part in range(2)]
    np.testing.assert_array_equal(np.concatenate([halves[0][1], halves[1][0]]), images[[4, 5, 2, 3]])


def test_the_writers_pictures_are_read_without_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    with ImageWriter(tmp_path / "a.npz", 4, 4) as writer:
        writer.write(images)
    reader = ImageReader(tmp_path / "a.npz")
    assert reader.labels is None
    np.testing.assert_array_equal(next(reader.batches(8)), images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"codes": np.zeros(3)}, r"holds no pictures: it needs an array arr_0, uint8 \[N, H, W, 3\]"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"arr_0 must be uint8 .*, not float32 \[2, 4, 4, 3\]"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"arr_0 must be uint8 .*, not uint8 \[2, 3, 4, 4\]"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"not uint8 \[0, 4, 4, 3\]"),
    ],
)
def test_what_holds_no_pictures_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        ImageReader(tmp_path / "a.npz")


def test_damaged_pictures_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read pictures from .*none.npz: No such file"):
        ImageReader(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"cannot read pictures from .*text.npz: File is not a zip file"):
        ImageReader(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (5, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(100))
    with pytest.raises(InputError, match=r"short.npz is damaged: it ends early"):
        list(ImageReader(tmp_path / "short.npz").batches(2))


def test_labels_of_images_are_read_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], np.int32)
    with ImageWriter(tmp_path / "a.npz", 4, 4, labels=labels) as writer:
        for part in (slice(0, 2), slice(2, 5)):
            writer.write(images[part])
    reader = ImageReader(tmp_path / "a.npz")
    np.testing.assert_array_equal(reader.labels, labels)
    np.testing.assert_array_equal(np.concatenate(list(reader.batches(4))), images)
    with (
        pytest.raises(ValueError, match="labels of 5 images only"),
        ImageWriter(tmp_path / "b.npz", 4, 4, labels=labels) as writer,
    ):
        writer.write(np.concatenate([images, images]))
    assert not (tmp_path / "b.npz").exists()
