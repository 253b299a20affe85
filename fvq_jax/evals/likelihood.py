"""How well a generator predicts held-out codes: one pass over all of them, on all hosts.

The caller computes the likelihoods. Every figure is a sum over codes, in 64 bits on the host, without padding.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fvq_jax.evals.ngram_bits import NGrams
from fvq_jax.runtime.agreement import everywhere
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.hosts import sum_over_hosts

# This host's labels and codes -> nats of every code, and whether it is the likeliest one; both on the host.
Score = Callable[
    [Int[np.ndarray, "b"], Int[np.ndarray, "b t"]], tuple[Float[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]
]


def collect(
    score: Score,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    ngrams: NGrams | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> dict[str, Any]:
    """Sums over all codes of all batches and hosts.

    Args:
      score: likelihoods of a batch; all hosts call it equally often.
      batches: this host's share: codes int32 [b, t], label int32 [b], mask bool [b], False in rows that must not count.
      ngrams: the models to compare with; None leaves their sums out.
      progress: called after every batch with how many images of this host were seen since the last call.

    Returns:
      images, codes, nats, hits; and `ngrams`, the sums of `NGrams.bits`.

    Raises:
      InputError: there is no image, or a batch cannot be read on some host.
    """
    sums: dict[str, Any] = {"images": np.int64(0), "codes": np.int64(0), "nats": np.float64(0), "hits": np.int64(0)}
    while (batch := everywhere(lambda: next(batches, None))) is not None:
        mask, codes = batch["mask"], batch["codes"]
        nats, hits = score(batch["label"], codes)
        sums["images"] += mask.sum()
        sums["codes"] += mask.sum() * codes.shape[1]
        sums["nats"] += nats[mask].sum(dtype=np.float64)
        sums["hits"] += hits[mask].sum()
        if ngrams is not None:
            bits = ngrams.bits(codes, mask)
            before = sums.get("ngrams", {name: np.zeros_like(value) for name, value in bits.items()})
            sums["ngrams"] = {name: before[name] + value for name, value in bits.items()}
        progress(int(mask.sum()))
    sums = sum_over_hosts(sums)
    if not sums["images"]:
        raise InputError("the evaluation set has no image")
    return sums


def summarise(sums: dict[str, Any], pixels: int) -> dict[str, float]:
    """The metrics by name, from the sums of `collect`; `pixels` is how many an image has, 0 if that is not known.

    `nll` is in nats per code, `nll_bits` in bits; `nll_perplexity` is exp(nll): the generator is as uncertain as if it
    chose among so many equally likely codes. `accuracy` is the share of the codes that are the likeliest. With
    `bits_per_pixel`, the codes of an image can be stored by an entropy coder that knows the generator and the class.
    """
    nll = float(sums["nats"]) / int(sums["codes"])
    bits = nll / math.log(2)
    found = {
        "nll": nll,
        "nll_bits": bits,
        "nll_perplexity": math.exp(min(nll, 700.0)),  # beyond, a float would overflow
        "accuracy": int(sums["hits"]) / int(sums["codes"]),
    }
    if pixels:
        found["bits_per_pixel"] = bits * int(sums["codes"]) / int(sums["images"]) / pixels
    return found
