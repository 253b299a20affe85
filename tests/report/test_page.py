import errno
import os
import pathlib
import re

import pytest

from fvq_jax.report.page import shell, write_page
from fvq_jax.runtime.errors import InputError


def test_a_page_is_whole_and_forbids_to_ask_for_anything():
    page = shell("My run", "<h1>Here</h1>")
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "<title>My run</title>" in page
    assert page.count("<h1>Here</h1>") == 1
    assert "default-src 'none'" in page
    assert not re.findall(r"""\b(?:src|href)=["'](?!data:|#)""", page)


def test_a_title_is_text_and_a_body_is_html():
    page = shell("<b>&", "<b>&amp;</b> $title ${body}")
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert "<b>&amp;</b> $title ${body}" in page


def test_a_page_has_its_place_in_the_folder(tmp_path):
    path = write_page(tmp_path / "new", "caf\N{LATIN SMALL LETTER E WITH ACUTE} \udce9")
    assert path == tmp_path / "new" / "report" / "index.html"
    assert path.read_text(encoding="utf-8") == "caf\N{LATIN SMALL LETTER E WITH ACUTE} \\udce9"
    write_page(tmp_path / "new", "again")
    assert path.read_text(encoding="utf-8") == "again"
    assert list(path.parent.iterdir()) == [path]


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*index.html"):
        write_page(tmp_path, "page")


def test_a_page_appears_once_it_is_whole(tmp_path, monkeypatch):
    path = write_page(tmp_path, "first")

    def full(self, text, **options):
        with self.open("w", encoding="utf-8") as file:
            file.write(text[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot write .*index.html: No space left"):
        write_page(tmp_path, "second")
    assert path.read_text(encoding="utf-8") == "first"
