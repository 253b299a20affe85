import jax
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from fvq_jax.evals.inception_score import SPLITS, InceptionScore
from fvq_jax.ops.code_usage import code_statistics


def test_inception_score_is_that_of_its_definition():
    logits = np.random.default_rng(0).normal(0, 3, (47, 12)).astype(np.float32)
    logits[3] += 1e4  # must not overflow
    split = np.arange(47) * SPLITS // 47
    here, there = InceptionScore.empty(12), InceptionScore.empty(12)
    here.add(logits[:20], split[:20])
    there.add(logits[20:], split[20:])
    expected = []
    for part in range(SPLITS):
        p = softmax(logits[split == part].astype(np.float64), axis=1)
        log_p = log_softmax(logits[split == part].astype(np.float64), axis=1)
        expected.append(np.exp(np.mean(np.sum(p * (log_p - np.log(p.mean(axis=0))), axis=1))))
    assert jax.tree.map(np.add, here, there).result() == pytest.approx((np.mean(expected), np.std(expected)))


def test_inception_score_at_its_bounds():
    sure = InceptionScore.empty(4)
    sure.add(np.eye(4)[np.arange(40) % 4] * 1e3, np.arange(40) // 4)
    assert sure.result() == pytest.approx((4, 0))
    same = InceptionScore.empty(4)
    same.add(np.ones((3, 4)), np.array([0, 0, 7]))
    assert same.result() == pytest.approx((1, 0))


def test_statistics_of_uniform_codes():
    found = code_statistics(np.full(1024, 5), pixels_per_code=64, choices=1024)
    assert found["entropy_bits"] == pytest.approx(10)
    assert found["log2_codebook_size"] == 10
    assert found["bits_per_pixel"] == found["entropy_bits_per_pixel"] == pytest.approx(10 / 64)
    assert found["dead_codes"] == 0
    assert found["top_1_percent_share"] == pytest.approx(11 / 1024)
    assert found["usage_if_uniform"] == pytest.approx(1 - (1 - 1 / 1024) ** 5120)


def test_statistics_of_a_collapsed_codebook():
    counts = np.zeros(200, np.int64)
    counts[[3, 50, 51]] = 2_000_000_000, 500_000_000, 1_500_000_000  # more than 2^31 together
    found = code_statistics(counts, pixels_per_code=256, choices=len(counts))
    assert found["dead_codes"] == 197
    assert found["top_1_percent_share"] == pytest.approx(0.875)
    assert found["entropy_bits"] == pytest.approx(0.5 * 1 + 0.125 * 3 + 0.375 * np.log2(8 / 3))
    assert found["entropy_bits_per_pixel"] == pytest.approx(found["entropy_bits"] / 256)
    assert found["bits_per_pixel"] == pytest.approx(np.log2(200) / 256)
    assert found["usage_if_uniform"] == 1


@pytest.mark.parametrize("size", [1, 4])
def test_statistics_of_no_tokens_are_numbers(size):
    assert np.isfinite(list(code_statistics(np.zeros(size, np.int64), 4, size).values())).all()
