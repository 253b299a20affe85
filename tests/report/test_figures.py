import re

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from fvq_jax.report import figures
from fvq_jax.training.metric_files import MetricWriter, read_metrics


def rows(steps=range(10, 60, 10)):
    return [
        {"step": step, "loss/total": 1.0 / step, "loss/entropy": -0.1, "usage/batch": 0.2, "usage/window": 0.5}
        for step in steps
    ]


def viridis(share):
    return matplotlib.colormaps["viridis"](share)[:3]


def labels(figure):
    return [line.get_label() for line in figure.axes[0].lines]


def test_svg_takes_its_colours_from_the_page_and_keeps_ids_apart():
    svg = figures.to_svg(figures.code_frequency_figure(np.array([5, 3, 0])), "one")
    assert svg.startswith("<svg")
    assert "var(--first)" in svg
    assert "var(--ink)" in svg
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", svg)
    assert all(name.startswith("one-") for name in re.findall(r'id="([^"]*)"|url\(#([^)]*)', svg)[0] if name)
    assert svg == figures.to_svg(figures.code_frequency_figure(np.array([5, 3, 0])), "one")
    assert not re.search(r"<svg[^>]* width=", svg)


def test_code_frequencies_are_sorted_on_logarithmic_axes_against_even_use():
    (axes,) = figures.code_frequency_figure(np.array([0, 30, 10, 60])).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [60, 30, 10])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), 25)
    assert labels(axes.figure)[1] == "even use, 25 times each"
    assert [patch.get_label() for patch in axes.patches] == ["never chosen, 1 codes"]


@pytest.mark.parametrize("counts", [np.zeros(8, np.int64), np.ones(1, np.int64), np.full(300, 7, np.int64)])
def test_figures_of_degenerate_histograms(counts):
    first_use = np.where(counts > 0, 0, 10)
    points = np.zeros((len(counts), 2), np.float32)
    assert "svg" in figures.to_svg(figures.code_frequency_figure(counts), "a")
    assert "svg" in figures.to_svg(figures.usage_over_images_figure(first_use, 1, 16), "b")
    assert "svg" in figures.to_svg(figures.codebook_map_figure(points, np.zeros(2, np.float32), counts), "c")


def test_usage_over_pictures_counts_codes_that_have_come_up():
    """Of ten codes: two in the first picture, one more in the third, and one that never comes up."""
    first_use = np.array([0, 0, 2, 5, 5, 5, 7, 9, 9, 100])
    (axes,) = figures.usage_over_images_figure(first_use, 10, 4).axes
    assert axes.get_xscale() == "log"
    seen, usage = axes.lines[0].get_data()
    assert (seen[0], seen[-1]) == (1, 10)
    found = dict(zip(seen, usage, strict=True))
    assert [found[n] for n in (1, 2, 3, 6, 10)] == [0.2, 0.2, 0.3, 0.6, 0.9]
    np.testing.assert_allclose(axes.lines[1].get_ydata()[0], 1 - 0.9**4)
    (axes,) = figures.usage_over_images_figure(first_use, 100_000, 4).axes
    assert 40 <= len(axes.lines[0].get_xdata()) <= 50


def test_map_marks_codes_that_were_never_chosen():
    points, counts = np.arange(8.0).reshape(4, 2), np.array([3, 0, 1, 0])
    share = np.array([0.5, 0.25])
    figure = figures.codebook_map_figure(points, share, counts)
    dead, alive, *_ = figure.axes[0].collections
    np.testing.assert_array_equal(dead.get_offsets(), points[[1, 3]])
    np.testing.assert_array_equal(alive.get_offsets(), points[[2, 0]])  # the most frequent on top
    np.testing.assert_array_equal(alive.get_array(), [1, 3])
    assert "never chosen, 2 codes" in figures.to_svg(figure, "map")
    assert figure.axes[0].get_xlabel() == "first principal axis (50.0% of the variance)"


def cells(points, counts):
    """The colours of the map's cells and its bar, drawn as a density."""
    figure = figures.codebook_map_figure(points, np.zeros(2), counts, most_points=1)
    (image,) = figure.axes[0].images
    return image.get_array(), figure.axes[1]


def test_map_of_many_codes_is_a_density():
    """Three cells: three codes, chosen eight times on average; two codes of which one is dead; a single dead code."""
    points = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [0, 1], [1, 1]], float)
    colours, bar = cells(points, np.array([8, 6, 10, 0, 8, 0]))
    alive, half, dead = colours[0, 0], colours[-1, 0], colours[-1, -1]
    np.testing.assert_allclose(alive[:3], viridis(1.0), atol=1e-6)
    np.testing.assert_allclose(dead[:3], to_rgb("#ff5a4f"), atol=1e-6)
    np.testing.assert_allclose(half[:3], (alive[:3] + dead[:3]) / 2, atol=1e-6)
    assert alive[3] == 1 > half[3] > dead[3] > 0.4
    assert np.count_nonzero(colours[..., 3]) == 3
    np.testing.assert_allclose(bar.get_ylim(), (1, 8))


def test_one_frequent_code_leaves_the_others_of_a_density_their_colours():
    """Of 1,000 cells 500 hold codes chosen once, 499 codes chosen twice, and one a code chosen 900 times."""
    points = np.stack(np.divmod(np.arange(1000.0), 100), axis=1)
    colours, _ = cells(points, np.repeat([1, 2, 900], [500, 499, 1]))
    expected = [viridis(0.0), viridis(1.0), viridis(1.0)]
    np.testing.assert_allclose([colours[0, 0, :3], colours[0, -1, :3], colours[-1, -1, :3]], expected, atol=1e-6)


def test_the_legend_of_the_map_shows_what_is_drawn():
    points, counts = np.arange(8.0).reshape(4, 2), np.array([3, 0, 1, 0])
    for most_points, kind in ((4, PathCollection), (3, Rectangle)):
        (legend,) = figures.codebook_map_figure(points, np.zeros(2), counts, most_points).legends
        assert [type(handle) for handle in legend.legend_handles] == [kind]
        assert [text.get_text() for text in legend.get_texts()] == ["never chosen, 2 codes"]


def test_a_bar_for_every_position():
    (axes,) = figures.position_figure(np.array([0.5, 0.0, 1.0])).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0, 1]
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.5]


def test_loss_panels():
    figure = figures.loss_figure([*rows(), {"step": 60, "loss/total": None, "loss/adversarial": 0.3}])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["total (log scale)", "entropy", "adversarial"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear"]
    steps, values = figure.axes[0].lines[0].get_data()
    np.testing.assert_array_equal(steps, [10, 20, 30, 40, 50])
    np.testing.assert_allclose(values, [1 / 10, 1 / 20, 1 / 30, 1 / 40, 1 / 50])
    assert figures.loss_figure([{"step": 1, "mfu": 0.5}]) is None


def test_long_loss_curves_get_a_running_mean():
    noisy = [{"step": step, "loss/total": 1.0 + (-1) ** step * 0.5} for step in range(200)]
    raw, smooth = figures.loss_figure(noisy).axes[0].lines
    assert np.ptp(raw.get_ydata()) == 1.0
    assert np.ptp(smooth.get_ydata()[10:-10]) < 0.2


def test_a_resumed_run_has_one_curve(tmp_path):
    for start, steps in ((0, [1, 2, 3, 4]), (2, [3, 4, 5])):
        with MetricWriter(tmp_path, start_step=start, active=True) as writer:
            for step in steps:
                writer.scalars(step, {"loss/total": step + start})
    steps, values = figures.loss_figure(read_metrics(tmp_path)).axes[0].lines[0].get_data()
    np.testing.assert_array_equal(steps, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(values, [1, 2, 5, 6, 7])


def test_usage_while_training_names_its_windows():
    logged = [*rows(), {"step": 50, "eval/usage": 0.75, "eval/tokens": 131_072}]
    figure = figures.usage_figure(logged, 1024, batch_tokens=2048, window_tokens=65_536)
    assert labels(figure) == [
        "one step: 2,048 tokens (even use 86.5%)",
        "last steps: 65,536 tokens (even use 100.0%)",
        "evaluation: 131,072 tokens (even use 100.0%)",
    ]
    assert [line.get_ydata()[-1] for line in figure.axes[0].lines] == [0.2, 0.5, 0.75]
    assert labels(figures.usage_figure(rows(), 1024)) == ["one step", "last steps"]
    assert figures.usage_figure([], 1024) is None
