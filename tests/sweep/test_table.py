import csv
import io
import os
import pathlib

import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.sweep import table
from fvq_jax.sweep.points import LOG, RECORD, make_points
from fvq_jax.sweep.table import gather, series, shared_config, swept_fields, swept_values, to_csv, to_markdown
from fvq_jax.training.metric_files import METRICS_FILE
from tests.helpers.sweep_folder import write_point, write_sweep
from tests.helpers.tiny import tiny_config


def test_points_are_gathered_while_the_sweep_runs(tmp_path):
    write_sweep(tmp_path)
    done, running, failed, waiting = gather(tmp_path)
    assert [row.record.index for row in (done, running, failed, waiting)] == [0, 1, 2, 3]
    assert [row.status for row in (done, running, failed, waiting)] == ["finished", "running", "failed", "waiting"]
    assert done.values == {
        "step": 4,
        "usage": 0.25,
        "perplexity": 12.0,
        "psnr": 22.5,
        "parameters": 1234,
        "seconds": 60.5,
        "images_per_second": 6.5,
        "peak_memory_bytes": 3 * 1024**3,
    }
    assert running.values["psnr"] == 21.0
    assert running.values["step"] == 4
    assert running.values["images_per_second"] == 7.0
    assert "seconds" not in running.values
    assert failed.values == waiting.values == {}


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    (point,) = make_points(tiny_config(), [{}], tmp_path)
    write_point(point, "running", [{"step": 3, "eval/psnr": None, "eval/usage": 0.5}])
    assert gather(tmp_path)[0].values == {"step": 3, "usage": 0.5}


def test_the_mean_usage_is_an_integral_over_the_steps(tmp_path):
    (point,) = make_points(tiny_config(), [{}], tmp_path)
    windows = [{"step": step, "usage/window": usage} for step, usage in ((10, 0.0), (20, 0.5), (50, 0.7))]
    write_point(point, "running", windows)
    assert gather(tmp_path)[0].values["mean_usage"] == pytest.approx((10 * 0.25 + 30 * 0.6) / 40)


def test_a_run_without_a_sign_of_life_is_said_to_be_silent(tmp_path):
    (point,) = make_points(tiny_config(), [{}], tmp_path)
    write_point(point, "running")
    for name in (RECORD, METRICS_FILE):
        os.utime(point.workdir / name, (1000.0, 1000.0))
    assert gather(tmp_path, now=1000.0 + 5400)[0].status == "running? silent for 90 min"
    (point.workdir / LOG).write_text("")
    os.utime(point.workdir / LOG, (6000.0, 6000.0))
    assert gather(tmp_path, now=1000.0 + 5400)[0].status == "running"


def test_a_folder_without_points_is_refused(tmp_path):
    with pytest.raises(InputError, match="no point of a sweep in"):
        gather(tmp_path)


def test_csv_has_every_value_in_full(tmp_path):
    write_sweep(tmp_path)
    lines = list(csv.DictReader(io.StringIO(to_csv(gather(tmp_path)))))
    assert lines[0]["point"] == "tokenizer.quantizer.codebook_size=64,tokenizer.quantizer.bridge=none"
    assert lines[0]["tokenizer.quantizer.codebook_size"] == "64"
    assert lines[0]["tokenizer.quantizer.bridge"] == "none"
    assert lines[0]["peak_memory_bytes"] == str(3 * 1024**3)
    assert [line["status"] for line in lines] == ["finished", "running", "failed", "waiting"]
    assert lines[2]["error"].startswith(
        "exit code 1: step 3: loss/total is nan | inf (tokenizer.quantizer.codebook_size=256"
    )
    assert lines[3]["psnr"] == lines[3]["error"] == ""
    assert "rfid" not in lines[0]


def test_markdown_is_a_table_and_the_problems(tmp_path):
    write_sweep(tmp_path)
    lines = to_markdown(gather(tmp_path)).splitlines()
    assert lines[0] == (
        "| codebook_size | bridge | Status | Step | Codes used | Perplexity | PSNR (dB) | Parameters | Time (s) "
        "| Images/s | Peak memory (GiB) |"
    )
    assert lines[2] == "| 64 | none | finished | 4 | 25.0% | 12 | 22.50 | 1,234 | 60 | 6.5 | 3.00 |"
    assert lines[3] == "| 64 | XS/2 | running | 4 | 25.0% | 12 | 21.00 |  |  | 7.0 | 3.00 |"
    assert lines[5] == "| 256 | XS/2 | waiting |  |  |  |  |  |  |  |  |"
    assert lines[7].startswith(
        "- `tokenizer.quantizer.codebook_size=256,tokenizer.quantizer.bridge=none` failed, exit code 1: step 3"
    )
    assert lines[7].endswith(f"/{LOG})")


def rows_of(tmp_path, sweep):
    for point in make_points(tiny_config(), sweep, tmp_path):
        write_point(point, "waiting")
    return gather(tmp_path)


def test_points_are_drawn_over_the_first_field_with_a_line_for_each_value_of_the_others(tmp_path):
    write_sweep(tmp_path)
    field, lines = series(gather(tmp_path))
    assert field == "tokenizer.quantizer.codebook_size"
    assert [(label, [row.record.index for row in rows]) for label, rows in lines] == [
        ("bridge none", [0, 2]),
        ("bridge XS/2", [1, 3]),
    ]


def test_a_field_that_follows_from_the_first_makes_no_lines_of_its_own(tmp_path):
    sweep = [
        {"tokenizer.quantizer.codebook_size": 64, "tokenizer.quantizer.bridge": "XS/1"},
        {"tokenizer.quantizer.codebook_size": 256},
    ]
    rows = rows_of(tmp_path, sweep)
    field, lines = series(rows)
    assert field == "tokenizer.quantizer.codebook_size"
    assert [label for label, _ in lines] == [""]
    assert swept_values(rows[1], swept_fields(rows)) == [256, "XS/2"]  # what it does not replace is its config's


def test_a_single_point_without_overrides_can_be_drawn(tmp_path):
    rows = rows_of(tmp_path, [{}])
    assert series(rows) == ("", [("", rows)])


def test_short_names_stay_apart():
    assert table.short_names(["optim.decay", "seed"]) == {"optim.decay": "decay", "seed": "seed"}
    fields = ["batch_size", "eval.batch_size"]
    assert table.short_names(fields) == dict(zip(fields, fields, strict=True))


def test_what_points_share_is_told_apart_from_what_is_swept(tmp_path):
    write_sweep(tmp_path)
    shared = shared_config(gather(tmp_path))
    assert shared["tokenizer.quantizer.code_dim"] == 8
    assert "tokenizer.quantizer.bridge" not in shared


def test_rows_come_from_subfolders_only(tmp_path):
    (tmp_path / "other").mkdir()
    rows_of(tmp_path, [{"seed": 3}])
    assert [pathlib.Path(row.record.name).name for row in gather(tmp_path)] == ["seed=3"]
