"""Evaluates a tokenizer while it trains, on the mesh of the run, where its state is.

It scores the same pictures with the same functions as `fvq_jax.evaluate --workdir=DIR`. The loop decides when to
evaluate, and what to do with the result.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from fvq_jax.data.record import Source
from fvq_jax.evals.networks import FILES, Networks, load_networks
from fvq_jax.evals.projection import principal_plane
from fvq_jax.evals.reconstruction import Found, Reconstructed, collect, not_computed, summarise
from fvq_jax.evals.reference import Moments
from fvq_jax.models.tokenizer import TokenizerNet, fold
from fvq_jax.ops.pixels import to_float
from fvq_jax.runtime.cpu_devices import compiler_options
from fvq_jax.runtime.mesh import BATCH, global_batch, local_rows, replicated
from fvq_jax.runtime.names import dotted


def evaluation_networks(config: ConfigDict) -> Networks:
    """The networks of a run's metrics: for rFID if `eval.inception` is set, for LPIPS if its loss has its files.

    InputError if a file that is named is missing or damaged.
    """
    fields = {"inception": "eval.inception", "vgg16": "loss.vgg16_path", "lpips_vgg": "loss.lpips_path"}
    given = dotted(config)
    files = dict.fromkeys(FILES) | {name: given[field] or None for name, field in fields.items()}
    return load_networks(files, config.data.image_size, fields)


class Evaluator:
    """Evaluates states of one run, all by the same compiled programs.

    Everything is computed in float32 and with a folded quantizer, as in the exported tokenizer, whatever the dtype of
    training is. `variables` are those of the tokenizer: parameters, and state that is only read.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, net: TokenizerNet, source: Source, networks: Networks):
        self._config, self._mesh, self._net = config, mesh, net
        self._source, self._networks = source, networks
        self._reference: Moments | None = None  # of the original crops, which stay the same

    def evaluate(
        self, variables: dict[str, Any], progress: Callable[[int], Any] = lambda done: None
    ) -> tuple[dict[str, float | int], dict[str, str], Found]:
        """Scores a tokenizer over the run's evaluation set; see `collect` for `progress` and what is raised.

        Returns the metrics by name, why others are missing, and what the pass over the pictures found.
        """
        config, folded = self._config, self._folded(variables)

        def reconstruct(crops: np.ndarray, _: np.ndarray) -> Reconstructed:
            images = global_batch({"image": crops}, self._mesh)["image"]
            return Reconstructed(*map(local_rows, self._reconstruct(folded, images)))

        size, quantizer = config.data.image_size, self._net.quantizer
        grid = (size // self._net.downsampling,) * 2
        found = collect(
            reconstruct,
            self._source,
            self._networks,
            codebook_size=quantizer.size,
            level_of=quantizer.level_of(*grid),
            size=size,
            batch_size=config.eval.batch_size,
            images=config.eval.images,
            num_workers=config.data.num_workers,
            timeout=config.data.timeout,
            max_unreadable=config.data.max_unreadable,
            keep_images=config.log.images,
            with_reference=self._reference is None,
            progress=progress,
        )
        if found.sums.real is not None and found.sums.images >= 2:
            self._reference = found.sums.real.moments()
        metrics = summarise(
            found.sums,
            size**2,
            quantizer.choices,
            self._reference,
            quantizer.level_names,
            quantizer.positions(),
        )
        return metrics, not_computed(self._networks, found.sums), found

    def plane(self, variables: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """The table's vectors on their two principal axes, see `principal_plane`; None without a table.

        All processes call it.
        """
        return jax.device_get(self._plane(self._folded(variables)))

    def folded(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The variables that are evaluated: those of the folded network. A pure function."""
        return fold(self._net, variables)[1]

    def reconstruct(
        self, folded: dict[str, Any], images: UInt8[Array, "b H W 3"]
    ) -> tuple[Float[Array, "b H W 3"], Int[Array, "b ..."], Float[Array, "b"], Float[Array, "b"]]:
        """What `Reconstructed` holds, with the variables that `folded` returned. A pure function."""
        output: Any = self._plain_net.apply(folded, to_float(images))
        return jnp.clip(output.reconstruction, -1, 1), output.quantized.codes, output.error, output.power

    @functools.cached_property
    def _plain_net(self) -> TokenizerNet:
        return self._net.clone(quantizer=self._net.quantizer.folded().clone(dtype=jnp.float32), dtype=jnp.float32)

    # Kept, since a new jitted function would compile again at every evaluation.
    @functools.cached_property
    def _folded(self):
        return jax.jit(self.folded)

    @functools.cached_property
    def _reconstruct(self):
        rows = NamedSharding(self._mesh, BATCH)
        return jax.jit(self.reconstruct, out_shardings=(rows,) * 4, compiler_options=compiler_options(self._mesh))

    @functools.cached_property
    def _plane(self):
        def plane(folded):
            table: Any = self._plain_net.apply(folded, method="table")
            return None if table is None else principal_plane(table)

        return jax.jit(plane, out_shardings=replicated(self._mesh))
