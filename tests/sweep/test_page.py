import html.parser
import re

import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.sweep import figures
from fvq_jax.sweep.page import write_report
from fvq_jax.sweep.points import make_points
from fvq_jax.sweep.table import gather
from tests.helpers.sweep_folder import EVALUATION, write_point, write_sweep
from tests.helpers.tiny import tiny_config


class Outline(html.parser.HTMLParser):
    """Attributes that load something, and whether tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(text):
    found = Outline()
    found.feed(text)
    assert found.open == []
    return found


def page_of(folder):
    assert write_report(folder)["files"][2] == str(folder / "index.html")
    return (folder / "index.html").read_text()


def test_all_three_files_are_written_while_the_sweep_runs(tmp_path):
    write_sweep(tmp_path)
    result = write_report(tmp_path)
    assert {name: result[name] for name in ("points", "finished", "running", "failed", "waiting")} == {
        "points": 4,
        "finished": 1,
        "running": 1,
        "failed": 1,
        "waiting": 1,
    }
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["index.html", "sweep.csv", "sweep.md"]


def test_the_page_holds_everything_itself(tmp_path):
    write_sweep(tmp_path)
    text = page_of(tmp_path)
    assert all(link.startswith(("data:", "#")) for link in outline(text).links)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    # Two scores over the swept field and over steps, and against four costs.
    assert text.count('<figure class="plot card">') == 2 + 2 + 8
    assert "exit code 1: step 3: loss/total is nan | inf" in text
    assert "not finished" in text
    assert text == page_of(tmp_path)


def test_a_number_leads_to_the_report_of_its_run(tmp_path):
    write_sweep(tmp_path)
    run = tmp_path / "tokenizer.quantizer.codebook_size=64,tokenizer.quantizer.bridge=none"
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("")
    links = [link for link in outline(page_of(tmp_path)).links if not link.startswith(("data:", "#"))]
    assert links == [f"{run.name}/report/index.html"]


def test_a_sweep_that_has_only_begun_has_a_page(tmp_path):
    for point in make_points(tiny_config(), [{"seed": 0}, {"seed": 1}], tmp_path):
        write_point(point, "waiting")
    text = page_of(tmp_path)
    outline(text)
    assert '<figure class="plot card">' not in text


@pytest.mark.parametrize("count", [3, 12])
def test_many_points_numbers_and_words_can_be_drawn(tmp_path, count):
    sweep = [{"tokenizer.quantizer.code_dim": 4 * 2**place, "data.flip": place % 2 == 0} for place in range(count)]
    for point in make_points(tiny_config(), sweep, tmp_path):
        write_point(point, "finished", [{"step": 1, **EVALUATION}], exit_code=0, summary={"parameters": 10})
    text = page_of(tmp_path)
    outline(text)
    assert "tokenizer.quantizer.code_dim" in text
    assert text.count('<figure class="plot card">') == 2 + 2 + 2


def test_many_points_of_two_fields_have_a_panel_for_every_value_of_the_first(tmp_path):
    sweep = [{"tokenizer.quantizer.code_dim": dim, "seed": seed} for dim in (4, 8, 16) for seed in range(4)]
    lines = [{"step": step, "usage/window": 0.1 * step, **EVALUATION} for step in (1, 2)]
    for point in make_points(tiny_config(), sweep, tmp_path):
        write_point(point, "finished", lines, exit_code=0)
    rows = gather(tmp_path)
    for figure in (figures.windows_figure(rows), figures.steps_figure(rows, "psnr")):
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["code_dim 4", "code_dim 8", "code_dim 16"]
        assert [len(axes.lines) for axes in figure.axes] == [4, 4, 4]
        assert [text.get_text() for text in figure.legends[0].texts] == [f"seed {seed}" for seed in range(4)]
        assert [axes.get_xlabel() for axes in figure.axes] == ["training step"] * 3
        assert figure.legends[0].legend_handles[3].get_color() == figure.axes[2].lines[3].get_color()
    few = figures.windows_figure(rows[:8])
    assert [len(axes.lines) for axes in few.axes] == [8]
    assert few.legends[0].texts[5].get_text() == "5: code_dim 8, seed 1"
    assert list(few.axes[0].lines[0].get_ydata()) == [0.1, 0.2]
    assert "Codes used in windows of training over steps" in page_of(tmp_path)


def test_names_are_escaped(tmp_path):
    (point,) = make_points(tiny_config(), [{"data.train_dir": "<b>&"}], tmp_path)
    write_point(point, "finished", [{"step": 1, **EVALUATION}], exit_code=0)
    text = page_of(tmp_path)
    outline(text)
    assert "<b>&<" not in text
    assert "&lt;b&gt;&amp;" in text


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    write_sweep(tmp_path)
    (tmp_path / "sweep.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*sweep\.csv"):
        write_report(tmp_path)
