import pytest

from fvq_jax.runtime.checksums import FILE, find_damage, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b c", "later"):
        (tmp_path / name).write_text(f"content of {name}")
    write_checksums(tmp_path, leave_out=("later",))
    return tmp_path


def test_every_file_is_listed_but_those_left_out(folder):
    assert [line.split("  ", 1)[1] for line in (folder / FILE).read_text().splitlines()] == ["a", "deep/b c"]
    (folder / "later").write_text("changed")
    (folder / "new").write_text("new")
    assert find_damage(folder) == ""
    write_checksums(folder)
    assert [line.split("  ", 1)[1] for line in (folder / FILE).read_text().splitlines()] == [
        "a",
        "deep/b c",
        "later",
        "new",
    ]


def test_what_changed_or_went_is_named(folder):
    (folder / "deep/b c").write_text("Content of deep/b c")
    assert find_damage(folder) == "deep/b c has changed since it was written"
    (folder / "deep/b c").unlink()
    assert find_damage(folder) == "deep/b c is missing"


@pytest.mark.parametrize("text", [b"", b"no list", b"\xff\xfe"])
def test_a_damaged_list_is_damage(folder, text):
    (folder / FILE).write_bytes(text)
    assert FILE in find_damage(folder)


def test_without_a_list_nothing_is_known(tmp_path):
    assert find_damage(tmp_path) == ""
