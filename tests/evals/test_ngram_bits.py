import collections
import math

import numpy as np
import pytest

from fvq_jax.evals.ngram_bits import STRENGTHS, NGrams, bits_per_code
from fvq_jax.runtime.errors import InputError


def sequences(n, t, vocab, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, (n, t)) ** 2 % vocab  # some codes are more frequent


def oracle(train, test, vocab):
    """The formulas of the docstring with dictionaries, one code at a time."""
    single, pairs, before = collections.Counter(), collections.Counter(), collections.Counter()
    for row in train:
        for previous, code in zip(["begin", *row[:-1]], row, strict=True):
            single[code] += 1
            pairs[previous, code] += 1
            before[previous] += 1
    unigram, bigram = 0.0, np.zeros(len(STRENGTHS))
    for row in test:
        for previous, code in zip(["begin", *row[:-1]], row, strict=True):
            p = (single[code] + 0.5) / (train.size + 0.5 * vocab)
            unigram -= math.log2(p)
            bigram -= [math.log2((pairs[previous, code] + s * p) / (before[previous] + s)) for s in STRENGTHS]
    return unigram, bigram


@pytest.mark.parametrize("vocab", [7, 50])
def test_bits_are_those_of_the_formulas(vocab):
    train, test = sequences(30, 9, vocab), sequences(8, 9, vocab, seed=1)
    found = NGrams(vocab, [train[:13], train[13:]]).bits(test)
    unigram, bigram = oracle(train, test, vocab)
    assert found["codes"] == test.size
    assert found["unigram"] == pytest.approx(unigram)
    np.testing.assert_allclose(found["bigram"], bigram)


def test_probabilities_of_all_codes_add_up_to_one():
    ngrams = NGrams(5, [sequences(20, 6, 5)])
    for first in range(5):
        both = [ngrams.bits(np.array([[first, code]])) for code in range(5)]
        start = ngrams.bits(np.array([[first]]))
        for name in ("unigram", "bigram"):
            np.testing.assert_allclose(sum(2.0 ** -(b[name] - start[name]) for b in both), 1.0)


def test_sums_of_parts_add_up_and_masked_rows_do_not_count():
    ngrams = NGrams(9, [sequences(20, 6, 9)])
    rows = sequences(10, 6, 9, seed=2)
    whole, first, rest = ngrams.bits(rows), ngrams.bits(rows[:4]), ngrams.bits(rows, np.arange(10) >= 4)
    for name, value in whole.items():
        np.testing.assert_allclose(first[name] + rest[name], value)


def test_a_chain_is_predicted_by_pairs_and_not_by_single_codes():
    codes = (np.arange(12)[None] * 3 + np.arange(400)[:, None]) % 64
    found = bits_per_code(NGrams(64, [codes[:300]]).bits(codes[300:]))
    assert found["unigram_bits"] == pytest.approx(6.0, abs=0.01)
    assert found["bigram_bits"] < 0.6  # the first of twelve codes is a guess: 6 / 12 bits


def test_a_vocabulary_of_a_million_needs_no_table_of_pairs():
    vocab = 2**20
    rows = np.random.default_rng(0).integers(0, vocab, (200, 64), dtype=np.int32)
    found = bits_per_code(NGrams(vocab, [rows]).bits(rows[:10]))
    assert found["bigram_bits"] < 2 < found["unigram_bits"]  # it has seen these pairs


def test_counting_stops_at_the_limit():
    rows = sequences(10, 4, 6)
    assert NGrams(6, (rows[i : i + 1] for i in range(10)), limit=10).codes == 12
    assert NGrams(6, [rows]).codes == 40


@pytest.mark.parametrize(
    ("rows", "message"), [([[0, 6]], "in 0..5, and some are from 0 to 6"), ([[-1, 2]], "from -1 to 2")]
)
def test_a_code_outside_the_vocabulary_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        NGrams(6, [np.array(rows)])
    with pytest.raises(InputError, match="no sequences"):
        NGrams(6, [])
