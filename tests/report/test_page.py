import dataclasses
import html
import re

import pytest

from fvq_jax.errors import InputError
from fvq_jax.report.page import page, write_page
from fvq_jax.report.published import RESULTS
from tests.report_case import made_up_report


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
    assert "<code>tokenizer.bridge</code>" in text


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
        write_page(tmp_path, report)
