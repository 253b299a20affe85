"""The evaluation of a training state where it lies: on the run's mesh, with `evals.suite` and the run's config.

The same pictures by the same functions as `fvq_jax.evaluate --workdir=DIR`. When to evaluate, and what becomes of the
result, is left to the loop.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from fvq_jax.data.record import Source
from fvq_jax.errors import InputError
from fvq_jax.evals.networks import load_networks
from fvq_jax.evals.projection import principal_plane
from fvq_jax.evals.reference import Moments
from fvq_jax.evals.suite import Found, collect, not_computed, summarise
from fvq_jax.sharding import BATCH, global_batch, replicated
from fvq_jax.state import TrainState
from fvq_jax.tasks.tokenizer import TokenizerTask


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of a state by name, why others are missing, and what the pass over the pictures found."""

    metrics: dict[str, float | int]
    not_computed: dict[str, str]
    found: Found


class Evaluator:
    """Evaluates states of one run, of which all share the compiled programs.

    rFID and Inception Score are computed if `eval.inception` names a weight file, LPIPS if `loss.vgg16_path` and
    `loss.lpips_path` do. InputError if the first is missing or one is damaged.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, task: TokenizerTask, source: Source):
        inception = config.eval.inception
        if inception and not os.path.isfile(inception):
            raise InputError(f"eval.inception: there is no file {inception!r} (leave it empty to do without rFID)")
        files = {"inception": inception, "vgg16": config.loss.vgg16_path, "lpips_vgg": config.loss.lpips_path}
        files = {name: path or None for name, path in files.items()} | dict.fromkeys(("alexnet", "lpips_alex"))
        self._networks = load_networks(files, config.data.image_size)
        self._config, self._mesh, self._task, self._source = config, mesh, task, source
        self._reference: Moments | None = None  # of the crops, which stay the same

    def evaluate(self, state: TrainState, progress: Callable[[int], Any] = lambda done: None) -> Evaluation:
        """Scores a state over the run's evaluation set; see `collect` for `progress` and what is raised."""
        config, params = self._config, self._eval_params(state)

        def reconstruct(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            images = global_batch({"image": crops}, self._mesh)["image"]
            images, codes = self._eval_step(params, images)
            return _local_rows(images), _local_rows(codes)

        found = collect(
            reconstruct,
            self._source,
            self._networks,
            codebook_size=self._task.codebook_size,
            size=config.data.image_size,
            batch_size=config.eval.batch_size,
            images=config.eval.images,
            num_workers=config.data.num_workers,
            timeout=config.data.timeout,
            keep_images=config.log.images,
            with_reference=self._reference is None,
            progress=progress,
        )
        if found.sums.real is not None and found.sums.images >= 2:
            self._reference = found.sums.real.moments()
        metrics = summarise(found.sums, self._task.downsampling, self._reference)
        return Evaluation(metrics, not_computed(self._networks, found.sums), found)

    def plane(self, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        """The codes on their two principal axes, see `principal_plane`. All processes must call it."""
        return jax.device_get(self._plane(self._eval_params(state)))

    # Kept, since a new jitted function would compile again at every evaluation.
    @functools.cached_property
    def _eval_params(self):
        return jax.jit(self._task.eval_params)

    @functools.cached_property
    def _eval_step(self):
        rows = NamedSharding(self._mesh, BATCH)
        return jax.jit(self._task.eval_step, out_shardings=(rows, rows))

    @functools.cached_property
    def _plane(self):
        net = self._task.net.clone(bridge="none", entropy_temperature=None, dtype=jnp.float32)

        def plane(params):
            params = {"params": {"quantizer": params["quantizer"]}}
            return principal_plane(net.apply(params, method="bridged_codebook"))

        return jax.jit(plane, out_shardings=replicated(self._mesh))


def _local_rows(rows: jax.Array) -> np.ndarray:
    """This process's rows of a global array, in order."""
    shards = sorted(rows.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
