import math

import numpy as np
import pytest

from fvq_jax.evals.likelihood import collect, summarise
from fvq_jax.evals.ngram_bits import NGrams
from fvq_jax.runtime.errors import InputError
from tests.helpers.two_hosts import on_two_hosts

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 11, (12, 5), dtype=np.int32)
NATS = RNG.random((12, 5)).astype(np.float32)
HITS = RNG.random((12, 5)) < 0.3
MASK = np.arange(12) < 10


def batches(rows=slice(None), size=4):
    mask, codes = MASK[rows], CODES[rows]
    for i in range(0, len(mask), size):
        part = slice(i, i + size)
        # The label names the row, so that a stand-in for the generator can look it up.
        yield {"codes": codes[part], "label": np.arange(12, dtype=np.int32)[rows][part], "mask": mask[part]}


def score(labels, codes):
    np.testing.assert_array_equal(codes, CODES[labels])
    return NATS[labels], HITS[labels]


def test_sums_leave_out_padding():
    seen = []
    sums = collect(score, batches(), progress=seen.append)
    assert {name: type(value) for name, value in sums.items()} == {
        "images": np.int64,
        "codes": np.int64,
        "nats": np.float64,
        "hits": np.int64,
    }
    assert (sums["images"], sums["codes"], sums["hits"]) == (10, 50, HITS[:10].sum())
    assert sums["nats"] == pytest.approx(NATS[:10].astype(np.float64).sum())
    assert seen == [4, 4, 2]


def test_two_hosts_add_up_to_one(monkeypatch):
    ngrams = NGrams(11, [CODES])
    whole = collect(score, batches(), ngrams=ngrams)
    shares = [np.arange(12).reshape(3, 2, 2)[:, host].reshape(-1) for host in range(2)]
    for found in on_two_hosts(monkeypatch, lambda host: collect(score, batches(shares[host], 2), ngrams=ngrams)):
        for name in ("images", "codes", "hits"):
            assert found[name] == whole[name]
        np.testing.assert_allclose(found["nats"], whole["nats"])
        np.testing.assert_allclose(found["ngrams"]["bigram"], whole["ngrams"]["bigram"])
    np.testing.assert_allclose(whole["ngrams"]["bigram"], ngrams.bits(CODES[:10])["bigram"])


def test_the_metrics():
    found = summarise({"images": 2, "codes": 8, "nats": 8 * math.log(6), "hits": 2}, 64)
    assert found == pytest.approx(
        {
            "nll": math.log(6),
            "nll_bits": math.log2(6),
            "nll_perplexity": 6.0,
            "accuracy": 0.25,
            "bits_per_pixel": math.log2(6) * 4 / 64,
        }
    )
    assert "bits_per_pixel" not in summarise({"images": 2, "codes": 8, "nats": 1.0, "hits": 2}, 0)


def test_nothing_to_score_is_refused():
    with pytest.raises(InputError, match="no image"):
        collect(score, iter([]))
