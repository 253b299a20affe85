import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvq_jax.data.npz_rows import CodeReader, CodeWriter
from fvq_jax.runtime.errors import InputError

ROWS = np.random.default_rng(0).integers(0, 2**18, (7, 2, 3)).astype(np.int32)
NAMES = ["a.png", "b/c.jpg", "ünïcode.png", "d", "e" * 40, "f", "g"]


def write(path, rows=ROWS, names=NAMES, parts=((0, 3), (3, 4), (4, 7))):
    with CodeWriter(path, *rows.shape[1:]) as writer:
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


def test_an_exception_leaves_no_file(tmp_path):
    def write_too_few_names():
        with CodeWriter(tmp_path / "x.npz", 2, 3) as writer:
            writer.write(ROWS, NAMES)
            writer.write(ROWS, NAMES[:6])

    with pytest.raises(ValueError, match="do not fit 6 names"):
        write_too_few_names()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/x\.npz"):
        CodeWriter(tmp_path / "file" / "x.npz", 2, 3)


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(InputError, match=r"cannot read codes from .*x\.npz: No such file"):
        CodeReader(path)
    for arrays in (
        {"codes": ROWS.astype(np.float32), "names": np.array(NAMES)},
        {"codes": ROWS, "names": np.arange(7)},
        {"codes": ROWS, "names": np.array(NAMES[:6])},
        {"codes": ROWS[0], "names": np.array(NAMES[:2])},
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=r"x\.npz is no file of codes: it needs"):
            CodeReader(path)
    np.savez(path, codes=ROWS)
    with pytest.raises(InputError, match=r"cannot read codes from .*names\.npy"):
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
