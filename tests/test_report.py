import numpy as np
import pytest
from PIL import Image

from fvq_jax import report
from fvq_jax.metrics import MetricWriter, read_metrics


def pictures(count, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def rows(steps=range(10, 60, 10)):
    return [
        {"step": step, "loss/total": 1.0 / step, "loss/entropy": -0.1, "usage/batch": 0.2, "usage/window": 0.5}
        for step in steps
    ]


def test_grid_puts_each_reconstruction_below_its_original():
    originals, reconstructions = pictures(3), pictures(3, seed=1)
    grid = report.reconstruction_grid(originals, reconstructions, columns=2)
    side, pair_gap, column_gap, row_gap = 4 * 32, 2, 6, 14
    assert grid.shape == (2 * (2 * side + pair_gap) + row_gap, 2 * side + column_gap, 3)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = row * (2 * side + pair_gap + row_gap), column * (side + column_gap)
        pair = grid[top : top + 2 * side + pair_gap, left : left + side]
        np.testing.assert_array_equal(pair[:side:4, ::4], originals[index])
        np.testing.assert_array_equal(pair[3:side:4, 3::4], originals[index])  # enlarged pixels are blocks
        np.testing.assert_array_equal(pair[side + pair_gap :: 4, ::4], reconstructions[index])
        assert (pair[side : side + pair_gap] == 255).all()
    assert (grid[:, side : side + column_gap] == 255).all()
    assert (grid[2 * side + pair_gap + row_gap :, side:] == 255).all()  # no fourth pair


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 40, 4), (100, 200, 2), (128, 128, 1), (256, 192, 1)])
def test_only_small_pictures_are_enlarged(height, width, scale):
    grid = report.reconstruction_grid(pictures(1, height, width), pictures(1, height, width))
    assert grid.shape == (2 * height * scale + 2, width * scale, 3)


def test_grid_needs_as_many_reconstructions_as_originals():
    with pytest.raises(ValueError, match="as many"):
        report.reconstruction_grid(pictures(2)[:0], pictures(2)[:0])


def test_the_picture_of_reconstructions_holds_the_grid_unchanged(tmp_path):
    originals, reconstructions = pictures(9), pictures(9, seed=1)
    (path,) = report.write_report(tmp_path, [], None, originals, reconstructions)
    image = np.asarray(Image.open(path).convert("RGB"))
    grid = report.reconstruction_grid(originals, reconstructions)
    top = next(y for y in range(image.shape[0]) if (image[y, 34 : 34 + grid.shape[1]] == grid[0]).all())
    np.testing.assert_array_equal(image[top : top + grid.shape[0], 34 : 34 + grid.shape[1]], grid)


def test_report_of_a_whole_run(tmp_path):
    counts = np.arange(64, dtype=np.int32)
    written = report.write_report(tmp_path, rows(), counts, pictures(2), pictures(2))
    names = {"losses.png", "usage.png", "code_frequencies.png", "reconstructions.png"}
    assert {path.name for path in written} == names
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    for path in written:
        image = np.asarray(Image.open(path).convert("RGB"))
        assert min(image.shape[:2]) > 250
        assert (image.min(axis=-1) < 250).mean() > 0.02  # something was drawn


def test_report_of_a_run_that_has_logged_nothing_draws_nothing(tmp_path):
    assert report.write_report(tmp_path, [], None, None, None) == []
    assert report.write_report(tmp_path, [{"step": 1, "mfu": 0.5}], None, None, None) == []


@pytest.mark.parametrize("steps", [[5], range(1, 500)])
def test_report_of_one_row_and_of_many(tmp_path, steps):
    written = report.write_report(tmp_path, rows(steps), None, None, None)
    assert [path.name for path in written] == ["losses.png", "usage.png"]


def test_loss_panels():
    figure = report.loss_figure([*rows(), {"step": 60, "loss/total": None, "loss/adversarial": 0.3}])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["total (log scale)", "entropy", "adversarial"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear"]
    steps, values = figure.axes[0].lines[0].get_data()
    np.testing.assert_array_equal(steps, [10, 20, 30, 40, 50])
    np.testing.assert_allclose(values, [1 / 10, 1 / 20, 1 / 30, 1 / 40, 1 / 50])


def test_long_loss_curves_get_a_running_mean():
    noisy = [{"step": step, "loss/total": 1.0 + (-1) ** step * 0.5} for step in range(200)]
    raw, smooth = report.loss_figure(noisy).axes[0].lines
    assert np.ptp(raw.get_ydata()) == 1.0
    assert np.ptp(smooth.get_ydata()[10:-10]) < 0.2


def test_a_resumed_run_has_one_curve(tmp_path):
    for start, steps in ((0, [1, 2, 3, 4]), (2, [3, 4, 5])):
        with MetricWriter(tmp_path, start_step=start, active=True) as writer:
            for step in steps:
                writer.scalars(step, {"loss/total": step + start})
    steps, values = report.loss_figure(read_metrics(tmp_path)).axes[0].lines[0].get_data()
    np.testing.assert_array_equal(steps, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(values, [1, 2, 5, 6, 7])


def test_usage_names_its_windows():
    logged = [*rows(), {"step": 50, "eval/usage": 0.75}]
    counts = np.full(1024, 128, np.int32)
    figure = report.usage_figure(logged, counts, batch_tokens=2048, window_tokens=65_536)
    (axes,) = figure.axes
    labels = [line.get_label() for line in axes.lines]
    assert labels == [
        "batch (one step), 2,048 tokens (uniform use: 86.5%)",
        "window (last training steps), 65,536 tokens (uniform use: 100.0%)",
        "eval (held-out images), 131,072 tokens (uniform use: 100.0%)",
    ]
    assert [line.get_ydata()[-1] for line in axes.lines] == [0.2, 0.5, 0.75]
    unknown = report.usage_figure(rows())
    assert [line.get_label() for line in unknown.axes[0].lines] == ["batch (one step)", "window (last training steps)"]


def test_code_frequencies_are_sorted_against_uniform_use():
    counts = np.array([0, 30, 10, 60], np.int32)
    (axes,) = report.code_frequency_figure(counts).axes
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(axes.patches[0].get_data().values, [0.6, 0.3, 0.1])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 0.25)
    perplexity = np.exp(-sum(p * np.log(p) for p in (0.6, 0.3, 0.1)))
    title = f"Evaluation window of 100 tokens: usage 75.0% (3 of 4 codes), perplexity {perplexity:.1f}"
    assert axes.get_title(loc="left") == title


@pytest.mark.parametrize("counts", [np.zeros(8, np.int32), np.ones(1, np.int32), np.full(300, 7, np.int32)])
def test_code_frequencies_of_degenerate_histograms(counts):
    pixels = report.to_pixels(report.code_frequency_figure(counts))
    assert pixels.dtype == np.uint8
    assert pixels.min() < 100
