import pytest

from fvq_jax.evals.metric_table import METRICS, Metric


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("psnr", 27.8123, "27.81"),
        ("ssim", 0.76341, "0.763"),
        ("usage", 0.4567, "45.7%"),
        ("dead_codes", 12345, "12,345"),
        ("perplexity", 12345.6, "12,346"),
        ("peak_memory_bytes", 3 * 2**30, "3.00"),
        ("step", 20000.0, "20,000"),
        ("rfid", 0.0, "0.00"),
    ],
)
def test_a_value_as_people_read_it(name, value, text):
    assert METRICS[name].text(value) == text


def test_a_value_that_is_not_there():
    assert METRICS["rfid"].text(None) == ""
    assert METRICS["rfid"].text(None, missing="-") == "-"


@pytest.mark.parametrize(
    ("metric", "heading", "with_unit"),
    [
        (Metric("PSNR", ".2f", "dB"), "PSNR", "PSNR (dB)"),
        (Metric("LPIPS", ".3f", network="VGG16"), "LPIPS (VGG16)", "LPIPS (VGG16)"),
        (Metric("LPIPS", ".3f", "x", network="VGG16"), "LPIPS (VGG16)", "LPIPS (VGG16) (x)"),
    ],
)
def test_headings_name_network_and_unit(metric, heading, with_unit):
    assert (metric.heading, metric.heading_with_unit) == (heading, with_unit)


def test_no_two_figures_have_the_same_heading():
    headings = [metric.heading_with_unit for metric in METRICS.values()]
    assert len(set(headings)) == len(headings)


@pytest.mark.parametrize(
    ("names", "larger"),
    [
        (("psnr", "ssim", "inception_score", "precision", "recall", "class_accuracy", "usage", "perplexity"), True),
        (("images_per_second",), True),
        (("fid", "sfid", "nll_bits", "nll", "unigram_bits", "bigram_bits", "nll_perplexity"), False),
        (("rfid", "lpips_vgg", "lpips_alex", "l1", "mse", "dead_codes", "peak_memory_bytes"), False),
        (("step", "parameters", "bits_per_pixel"), None),
    ],
)
def test_which_direction_is_better(names, larger):
    assert {METRICS[name].larger_is_better for name in names} == {larger}
