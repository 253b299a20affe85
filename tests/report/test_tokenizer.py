import dataclasses
import html
import os
import re

import numpy as np
import pytest

from fvq_jax.ops.code_usage import level_statistics
from fvq_jax.report.published import RESULTS
from fvq_jax.report.tokenizer import page, write_report
from fvq_jax.runtime.errors import InputError
from tests.helpers.report_case import made_up_report


@pytest.fixture(scope="module")
def report():
    return made_up_report()


@pytest.fixture(scope="module")
def text(report):
    return page(report)


def test_it_asks_for_nothing_from_elsewhere(text):
    sources = re.findall(r"""\b(?:src|href|xlink:href)=["']([^"']*)""", text)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.findall(r"url\((?!#)[^)]*", text)
    assert "default-src 'none'" in text


def test_figures_are_there_and_formatted(report, text):
    for shown in ("1,024 &times; 256 codes", "27.81 <small>dB", "0.763", "89.", "<span>Bits per pixel</span><b>0.625"):
        assert html.unescape(shown) in text
    assert f"<span>Dead codes</span><b>{report.metrics['dead_codes']:,} " in text
    assert "not given: get the weights" in text
    assert "<code>tokenizer.quantizer.bridge</code>" in text


@pytest.mark.usefixtures("no_drawing")
def test_a_score_of_few_pictures_says_so(report, text):
    warning = "192 pictures:</b> the Frechet distance is biased upwards"
    assert warning in text
    assert "<span>rFID</span><b>1.23 <small></small></b><small>biased upwards<" in text
    for facts, metrics in (
        ({"different_pictures": 10_000}, report.metrics),
        ({}, {name: value for name, value in report.metrics.items() if name != "rfid"}),
    ):
        changed = dataclasses.replace(report, facts=report.facts | facts, metrics=metrics)
        assert "biased upwards" not in page(changed)


def test_inception_score_has_its_spread(text):
    assert html.unescape("<b>189.5 <small></small></b><small>&plusmn; 2.3<") in text


@pytest.mark.usefixtures("no_drawing")
def test_usage_stands_beside_that_of_even_use_of_as_many_tokens(report, text):
    assert "even use:" not in text  # 12,288 tokens of 1,024 codes
    few = dataclasses.replace(report, facts=report.facts | {"tokens": 1024})
    assert re.search(r"<span>Codes used</span><b>[\d.]+% <small></small></b><small>even use: 63.2%<", page(few))


@pytest.mark.usefixtures("no_drawing")
def test_the_summary_says_which_network_its_lpips_is_of(report):
    rows = {
        "0.201 VGG16": {"lpips_vgg": 0.201, "lpips_alex": 0.087},
        "0.087 AlexNet": {"lpips_alex": 0.087},
        html.unescape("&ndash;"): {},
    }
    others = {name: value for name, value in report.metrics.items() if not name.startswith("lpips")}
    for cell, scores in rows.items():
        text = page(dataclasses.replace(report, metrics=others | scores))
        assert re.search(r'<tr class="own">.*?<td>([^<]*)</td></tr>', text)[1] == cell


def test_reported_results_stand_beside_with_their_protocol(text):
    rows = re.findall(r'<tr class="">(.*?)</tr>', text)
    assert len(rows) == len(RESULTS)
    first = re.findall("<td>(.*?)</td>", rows[0])
    assert (
        first
        == ["FVQ", html.unescape("16,384 &times; 256"), html.unescape("16&times;"), "40", "100.0%", "1.30"]
        + [html.unescape("&ndash;")] * 3
    )
    assert "JPEG of quality 75 (protocol published)" in text
    assert ">21.85<" in text


def test_every_example_is_a_pair_with_a_slider(report, text):
    examples = report.found.examples
    count = len(examples.spread) + len(examples.worst) + len(examples.best)
    assert count == 8 + 6 + 6
    assert len(re.findall('<input type="range"', text)) == count
    assert len(re.findall('<img class="original" src="data:image/webp;base64,', text)) == count
    assert "lowest PSNR" in text


def test_every_plot_has_a_title_axes_and_a_caption(text):
    plots = re.findall(r'<figure class="plot.*?</figure>', text, flags=re.DOTALL)
    assert len(plots) == 5
    for plot in plots:
        assert re.search(r"<h3>.+</h3><svg.*</svg>\s*<figcaption>.{80,}</figcaption>", plot, flags=re.DOTALL)
    assert len(re.findall(r'id="([^"]+)"', text)) == len(set(re.findall(r'id="([^"]+)"', text)))


def test_names_are_text_and_not_html(text):
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text


def test_without_training_there_are_no_curves(report):
    bare = dataclasses.replace(report, rows=(), config={}, not_computed={})
    text = page(bare)
    assert "Training" not in text
    assert "Config of the run" not in text
    assert "Not computed" not in text
    assert len(re.findall('<figure class="plot', text)) == 3


def test_a_large_codebook_makes_no_large_page():
    report = made_up_report(codes=1 << 18, size=256)
    assert len(page(report)) < 2_000_000


def test_where_it_cannot_be_written(report, tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*index.html"):
        write_report(tmp_path, report)


@pytest.mark.usefixtures("no_drawing")
def test_names_that_are_no_text_stand_escaped(report, tmp_path):
    found = report.found
    named = dataclasses.replace(found.examples.spread[0], name=os.fsdecode(b"caf\xe9.png"))
    found = dataclasses.replace(found, examples=dataclasses.replace(found.examples, spread=[named]))
    path = write_report(tmp_path, dataclasses.replace(report, found=found))
    assert r"<span>caf\udce9.png</span>" in path.read_text(encoding="utf-8")


def test_usage_by_position_is_drawn_if_codes_are_grouped(report):
    title = "<h3>Codes used by position in the group</h3>"
    assert title not in page(report)
    for positions, shown in ((np.zeros(1024, int), False), (np.arange(1024) % 16, True)):
        tokenizer = dataclasses.replace(report.tokenizer, positions=positions)
        assert (title in page(dataclasses.replace(report, tokenizer=tokenizer))) == shown


@pytest.mark.usefixtures("no_drawing")
def test_levels_are_shown_apart_if_there_are_several(report):
    assert "At most, with so many tokens" not in page(report)
    counts = report.found.sums.code_counts
    sums = dataclasses.replace(
        report.found.sums, code_counts=np.concatenate([counts, np.eye(1, counts.size, dtype=int)])
    )
    names = ("level_1", "level_2")
    changed = dataclasses.replace(
        report,
        tokenizer=dataclasses.replace(report.tokenizer, levels=names),
        metrics={**report.metrics, **level_statistics(sums.code_counts, names, counts.size)},
        found=dataclasses.replace(report.found, sums=sums),
    )
    text = page(changed)
    assert "At most, with so many tokens" in text
    most = f"{1 / counts.size:.1%}"
    assert f"<td>level 2</td><td>1</td><td>{most}</td><td>{most}</td><td>1</td>" in text
    assert "Each level chooses from the same codes." in text
    own = dataclasses.replace(changed, tokenizer=dataclasses.replace(changed.tokenizer, choices=512))
    assert "Each level has 512 codes of its own." in page(own)
