"""Bits per code of the two simplest models of code sequences, beside which those of a generator mean something.

The unigram model knows how often every code occurs, the bigram model also which code came before. Both are counted on
training codes and scored on others; numpy on the host, in 64 bits.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

from fvq_jax.runtime.errors import InputError

# How many imagined occurrences, spread like the unigram model, are added to the codes that follow any one code. Every
# choice is scored, and the best one reported.
STRENGTHS = tuple(2.0**power for power in range(-4, 15, 2))
SMOOTHING = 0.5  # imagined occurrences of every code in the unigram model
CODES_COUNTED = 2**24  # no more training codes are counted: their pairs take 16 bytes each while they are sorted
_CHUNK = 2**21  # codes whose pairs are sorted at a time


class NGrams:
    """Counts of single codes and of pairs of neighbours in training sequences.

    Only the pairs that occur are kept, so memory does not depend on the vocabulary's square.

    Attributes:
      vocab: how many codes there are.
      codes: how many codes were counted.
    """

    def __init__(self, vocab: int, sequences: Iterable[Int[np.ndarray, "n t"]], limit: int = CODES_COUNTED):
        """Counts sequences, an array of several at a time, and stops after the array that reaches `limit` codes.

        InputError for a code outside the vocabulary, or if there are no sequences.
        """
        self.vocab, self.codes = vocab, 0
        self._single = np.zeros(vocab, np.int64)
        # Before the first code of a sequence comes a code of its own, `vocab`.
        self._before = np.zeros(vocab + 1, np.int64)
        self._pairs, self._times = np.zeros(0, np.int64), np.zeros(0, np.int64)
        waiting: list[np.ndarray] = []
        for block in sequences:
            if block.size and not (block.min() >= 0 and block.max() < vocab):
                raise InputError(
                    f"the training codes must be in 0..{vocab - 1}, and some are from {block.min()} to {block.max()}"
                )
            waiting.append(self._keys(block))
            self.codes += block.size
            if sum(map(len, waiting)) >= _CHUNK:
                self._merge(waiting)
                waiting = []
            if self.codes >= limit:
                break
        if not self.codes:
            raise InputError("there are no sequences to count")
        self._merge([*waiting, np.zeros(0, np.int64)])
        np.add.at(self._before, self._pairs // vocab, self._times)
        np.add.at(self._single, self._pairs % vocab, self._times)

    def bits(self, codes: Int[np.ndarray, "n t"], counted: Bool[np.ndarray, "n"] | None = None) -> dict[str, Any]:
        """The bits of these sequences, summed over all codes; codes of rows that are not `counted` are left out.

        The unigram model gives code b the probability p(b) = (n(b) + 1/2) / (n + v / 2). The bigram model gives b after
        a the probability (n(a, b) + s p(b)) / (n(a) + s), for every s in `STRENGTHS` (Dirichlet smoothing, Zhai and
        Lafferty 2004); the first code of a sequence follows a beginning, which counts as a code of its own.

        Returns:
          {"codes": int64, "unigram": float64, "bigram": float64 [len(STRENGTHS)]}, which add up over calls.
        """
        codes = codes if counted is None else codes[counted]
        keys = self._keys(codes)
        alone = (self._single[keys % self.vocab] + SMOOTHING) / (self.codes + SMOOTHING * self.vocab)
        place = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
        together = np.where(self._pairs[place] == keys, self._times[place], 0)
        before = self._before[keys // self.vocab]
        strength = np.array(STRENGTHS)[:, None]
        follows = (together[None] + strength * alone[None]) / (before[None] + strength)
        return {
            "codes": np.int64(len(keys)),
            "unigram": np.float64(-np.log2(alone).sum()),
            "bigram": -np.log2(follows).sum(axis=1),
        }

    def _keys(self, codes: Int[np.ndarray, "n t"]) -> Int64[np.ndarray, "m"]:
        """A number for every code and the one before it, in reading order."""
        codes = codes.astype(np.int64)
        before = np.pad(codes[:, :-1], ((0, 0), (1, 0)), constant_values=self.vocab)
        return (before * self.vocab + codes).reshape(-1)

    def _merge(self, waiting: list[np.ndarray]) -> None:
        """Adds these pairs to the counts."""
        keys, times = np.unique(np.concatenate(waiting), return_counts=True)
        pairs, where = np.unique(np.concatenate([self._pairs, keys]), return_inverse=True)
        total = np.zeros(len(pairs), np.int64)
        np.add.at(total, where, np.concatenate([self._times, times]))
        self._pairs, self._times = pairs, total


def bits_per_code(sums: dict[str, Any]) -> dict[str, float]:
    """{"unigram_bits", "bigram_bits"} from the sum of what `NGrams.bits` returned; the best smoothing counts.

    That the smoothing is chosen on the scored codes makes the bigram model look slightly better than it is.
    """
    codes = int(sums["codes"])
    bigram: Float64[np.ndarray, "s"] = np.asarray(sums["bigram"])
    if codes == 0:
        return {"unigram_bits": math.nan, "bigram_bits": math.nan}
    return {"unigram_bits": float(sums["unigram"]) / codes, "bigram_bits": float(bigram.min()) / codes}
