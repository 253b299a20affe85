"""A jitted program over the rows of a batch, on the devices of this process; numpy in, numpy out."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class RowParallel:
    """Computes `program(params, *rows)`, whose results must all have a leading axis of rows too.

    The rows are divided evenly over as many local devices as their number allows, and never padded: a batch that is a
    multiple of the number of devices uses all of them. Compiled once for every shape.
    """

    def __init__(self, program: Callable[..., Any], params: Any):
        self._program = jax.jit(program)
        self._params = params
        self._placed = functools.cache(self._place)

    def __call__(self, *rows: np.ndarray) -> Any:
        """The program's results, gathered on the host."""
        params, layout = self._placed(math.gcd(len(rows[0]), jax.local_device_count()))
        return jax.device_get(self._program(params, *jax.device_put(rows, layout)))

    def _place(self, devices: int) -> tuple[Any, NamedSharding]:
        mesh = Mesh(np.array(jax.local_devices()[:devices]), ("data",))
        return jax.device_put(self._params, NamedSharding(mesh, P())), NamedSharding(mesh, P("data"))
