"""The picture of counted codes."""

import json
import sys

import pytest

from benchmarks import missing_codes


def rows(*dead):
    return [{"tokens_per_code": 2.0**n, "codes": 1000, "dead_codes": count} for n, count in enumerate(dead)]


def write(path, found):
    path.write_text("\n".join(["what a program said", *map(json.dumps, found), "exit 0"]))
    return path


def test_curves_are_the_shares_of_missing_codes():
    axes = missing_codes.draw({"small": rows(500, 100, 20), "large": rows(700, 3, 0)}).axes[0]
    small, large, even = axes.lines
    assert list(small.get_xdata()) == [1, 2, 4]
    assert list(small.get_ydata()) == [0.5, 0.1, 0.02]
    assert list(large.get_ydata()) == [0.7, 0.003, missing_codes.LEAST]
    assert [line.get_label() for line in axes.lines] == ["small", "large", "even use"]
    assert even.get_ydata()[0] == pytest.approx(0.3679, abs=1e-3)


def test_the_picture_is_written(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.out", rows(5, 1))
    monkeypatch.setattr(sys, "argv", ["missing_codes", f"--out={tmp_path / 'a.png'}", f"1,000 codes={path}"])
    missing_codes.main()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_without_rows_is_named(tmp_path):
    path = write(tmp_path / "rows.out", [{"usage": 1}])
    with pytest.raises(ValueError, match=r"rows\.out holds no rows of count_codes\.py"):
        missing_codes.rows_of(path)


def test_a_run_needs_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["missing_codes", f"--out={tmp_path / 'a.png'}", "rows.out"])
    with pytest.raises(SystemExit):
        missing_codes.main()
    assert "rows.out is not NAME=ROWS" in capsys.readouterr().err
