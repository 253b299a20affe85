import dataclasses
import html
import re

import numpy as np
import pytest

from fvq_jax.report.generator import SampleSet, best_of, first_of_classes, page, write_generator_report
from fvq_jax.report.generator_figures import bits_figure, guidance_figure
from fvq_jax.report.published import FVQ, GENERATOR_SOURCES, GENERATORS
from fvq_jax.runtime.errors import InputError
from tests.helpers.generator_report_case import made_up_generator_report


@pytest.fixture(scope="module")
def report():
    return made_up_generator_report()


@pytest.fixture(scope="module")
def text(report):
    return page(report)


def rows_of(text, kind):
    lines = re.findall(rf'<tr class="{kind}">(.*?)</tr>', text)
    return [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines]


def test_it_is_one_file_that_loads_nothing(report, tmp_path):
    path = write_generator_report(tmp_path, report)
    assert path == tmp_path / "report" / "index.html"
    assert not re.search(r'(src|href)="(?!data:|#)', path.read_text())


def test_the_top_shows_the_best_set_and_the_generator(text):
    tiles = dict(re.findall(r'class="tile card"><span>(.*?)</span><b>(.*?) <small>', text))
    assert tiles["Bits per code"] == "5.514"
    assert tiles["Bigram, bits per code"] == "6.900"
    assert tiles["FID"] == "12.24"
    assert "<b>2,000</b> samples in each of 4 sets" in text
    assert "scores below: <b>guidance 2</b>" in text
    assert "protocol <b>adm, float32 distances, uint8 round</b>" in text
    assert "biased upwards" in text
    assert "real crops: 96.0%" in text


def test_every_class_has_a_row_in_every_set(report, text):
    grids = re.findall(r'<div class="classes small">(.*?)</div></details>', text)
    assert len(grids) == 4
    for grid in grids:
        captions = re.findall(r'<div class="row"[^>]*><span>(.*?)</span>', grid)
        assert captions == list(dict.fromkeys(report.samples[0].captions))
        assert len(re.findall("<img src=", grid)) == 60
    (opened,) = re.findall(r"<details class=\"card\" open><summary>(.*?)</summary>", text)
    assert opened == "guidance 2: FID 12.24, Class accuracy 90.0%"


@pytest.mark.usefixtures("no_drawing")
def test_pictures_without_classes_stand_together(report):
    one = dataclasses.replace(report.samples[0], captions=())
    shown = page(dataclasses.replace(report, samples=[one]))
    assert len(re.findall('<div class="row"', shown)) == 1
    assert "A row for every class" not in shown
    bare = dataclasses.replace(one, pictures=None)
    assert "<h2>Samples</h2>" not in page(dataclasses.replace(report, samples=[bare]))


def test_own_scores_stand_beside_published_ones(text):
    own = rows_of(text, "own")
    assert own[2] == [
        "guidance 2",
        "32",
        "12.24",
        "9.50",
        html.unescape("200.0 &plusmn; 2.5"),
        "0.800",
        "0.500",
        "90.0%",
    ]
    published = rows_of(text, "")
    assert len(published) == len(GENERATORS)
    assert published[0][:3] == ["FVQ-L, 343 M", "256", "2.39"]
    assert published[3] == ["LlamaGen-L, 343 M", "256", "3.80", "\N{EN DASH}", "248.3", "0.83", "0.51", "\N{EN DASH}"]
    assert {result.source for result in GENERATORS} == set(GENERATOR_SOURCES)
    assert f"<b>{FVQ}.</b> ImageNet, 50,000 samples. LlamaGen" in text
    assert "FID of 2,000 samples:</b> the Frechet distance is biased upwards" in text
    assert "scored against photos &lt;held out&gt;, as ADM" in text


@pytest.mark.usefixtures("no_drawing")
def test_names_are_text_and_not_html(report):
    one = dataclasses.replace(report.samples[0], name="<b>&", captions=("<i>",) * 60)
    shown = page(dataclasses.replace(report, samples=[one], title="<u>"))
    assert "&lt;b&gt;&amp;" in shown
    assert not re.search("<b>&|<i>|<u>", shown)


@pytest.mark.usefixtures("no_drawing")
def test_what_is_not_there_is_not_shown(report):
    bare = dataclasses.replace(report, samples=(), rows=(), config={}, not_computed={}, metrics={"nll_bits": 5.0})
    shown = page(bare)
    for title in ("Samples", "Guidance", "Beside reported results", "Training"):
        assert f"<h2>{title}</h2>" not in shown
    assert "Not computed" not in shown
    assert "Bits per code" in shown
    one = dataclasses.replace(report, samples=report.samples[:1])
    assert "<h2>Guidance</h2>" not in page(one)


def test_the_first_samples_of_evenly_spaced_classes():
    labels = np.arange(60) % 20
    positions, captions = first_of_classes(labels, classes=4, each=2)
    assert positions == [0, 20, 5, 25, 10, 30, 15, 35]
    assert captions == ("class 0",) * 2 + ("class 5",) * 2 + ("class 10",) * 2 + ("class 15",) * 2
    positions, captions = first_of_classes(np.array([2, 0, 2]), ["a", "b", "c"])
    assert (positions, captions) == ([1, 0, 2], ("a", "c", "c"))
    assert first_of_classes(np.array([2, 0]), ["a", "b"])[1] == ("a", "class 2")  # only the first classes have names


def test_the_best_set():
    def samples(name, **metrics):
        return SampleSet(name, metrics, 10)

    fids = [samples("a", fid=3.0), samples("b", fid=float("nan"), class_accuracy=1.0), samples("c", fid=2.0)]
    assert best_of(fids).name == "c"
    assert best_of([samples("a", class_accuracy=0.5), samples("b", class_accuracy=0.7)]).name == "b"
    assert best_of([samples("a"), samples("b")]).name == "a"
    assert best_of([]) is None


def test_scores_over_guidance_are_sorted_and_the_best_is_marked():
    scores = [{"fid": 5.0, "recall": 0.3}, {"fid": 9.0, "recall": 0.6}, {"fid": 6.0, "recall": 0.5}]
    figure = guidance_figure([1.5, 3.0, 1.0], scores)
    fid, recall = figure.axes
    np.testing.assert_array_equal(fid.lines[0].get_xdata(), [1.0, 1.5, 3.0])
    np.testing.assert_array_equal(fid.lines[0].get_ydata(), [6, 5, 9])
    assert (fid.get_title(loc="left"), recall.get_title(loc="left")) == ("FID", "Recall")
    assert (fid.lines[1].get_xdata()[0], recall.lines[1].get_xdata()[0]) == (1.5, 3.0)
    assert guidance_figure([1.0, 1.0], scores[:2]) is None
    assert guidance_figure([1.0, 2.0], [{}, {}]) is None


def test_bits_over_steps_stand_beside_the_baselines(report):
    (axes,) = bits_figure(report.rows).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["training, with dropout", "held out", "unigram, 8.70", "bigram, 6.90"]
    assert list(lines["held out"].get_xdata()) == [400, 800, 1200, 1600, 2000]
    assert bits_figure([{"step": 1, "loss/total": 2.0}]) is None


def test_a_page_that_cannot_be_written_is_one_line(report, tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*index\.html"):
        write_generator_report(tmp_path, dataclasses.replace(report, samples=(), rows=()))
