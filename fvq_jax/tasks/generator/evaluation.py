"""Evaluates a generator while it trains, on the mesh of the run, where its state is.

How well it predicts held-out codes is computed here; the loop decides when, and what to do with the result.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from fvq_jax.data.codes import CodeSource, held_out_batches
from fvq_jax.data.evaluation_set import CodeSample
from fvq_jax.data.prefetch import Prefetch
from fvq_jax.evals.likelihood import collect, summarise
from fvq_jax.evals.ngram_bits import NGrams, bits_per_code
from fvq_jax.models.gpt import GPT
from fvq_jax.ops.token_loss import token_nll
from fvq_jax.runtime.mesh import BATCH, global_batch, local_rows


class Evaluator:
    """Evaluates states of one run, all by the same compiled program, in float32 whatever the dtype of training is."""

    def __init__(self, config: ConfigDict, mesh: Mesh, net: GPT, train: CodeSource, held_out: CodeSource):
        self._config, self._mesh = config, mesh
        self._net = net.clone(dtype=jnp.float32)
        self._train, self._held_out = train, held_out
        self._baselines: dict[str, float] | None = None  # of codes, which stay the same

    def evaluate(
        self, params: Any, progress: Callable[[int], Any] = lambda done: None
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Scores parameters over the held-out codes; see `evals.likelihood` for the metrics and for what is raised.

        Returns metrics and facts by name.
        """
        config = self._config

        def score(labels: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            batch = global_batch({"label": labels, "codes": codes}, self._mesh)
            nats, hits = self._score(params, batch["label"], batch["codes"])
            return local_rows(nats), local_rows(hits)

        count = len(self._held_out)
        batches = held_out_batches(
            CodeSample(self._held_out, min(config.eval.images or count, count)),
            batch_size=config.eval.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
            vocab=self._net.vocab,
            classes=self._net.classes,
        )
        prefetched = Prefetch(batches, lambda batch: batch, timeout=config.data.timeout)
        try:
            ngrams = self._ngrams if self._baselines is None else None
            sums = collect(score, prefetched, ngrams=ngrams, progress=progress)
        finally:
            prefetched.close()
        if self._baselines is None:
            self._baselines = bits_per_code(sums["ngrams"])
        size = self._held_out.info.size
        metrics = summarise(sums, size * size) | self._baselines
        return metrics, {"images": int(sums["images"]), "codes": int(sums["codes"])}

    @functools.cached_property
    def _ngrams(self) -> NGrams:
        """The models to compare with, counted on training codes; every process counts the same."""

        def sequences() -> Iterator[np.ndarray]:
            sample = CodeSample(self._train, len(self._train))  # a part of it would be mixed, too
            for i in range(len(sample)):
                yield np.asarray(sample[i]["codes"]).reshape(-1, self._net.length)

        return NGrams(self._net.vocab, sequences())

    @functools.cached_property
    def _score(self) -> Any:
        def score(
            params: Any, labels: Int[Array, "b"], codes: Int[Array, "b t"]
        ) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
            hidden: Any = self._net.apply({"params": params}, labels, codes)
            return token_nll(hidden, params["output"], codes, mesh=self._mesh)

        rows = NamedSharding(self._mesh, BATCH)
        return jax.jit(score, out_shardings=(rows, rows))
