"""A jitted program over the rows of a batch, on the devices of this process; numpy in, numpy out."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.runtime.cpu_devices import compiler_options

BUDGET = 4 << 30  # bytes on a device for what one part of a batch needs: larger batches go through in more parts


class RowParallel:
    """Computes `program(params, *rows)`, whose results must all have a leading axis of rows too.

    The rows are divided evenly over as many local devices as their number allows, and never padded: a batch that is a
    multiple of the number of devices uses all of them. Compiled once for every shape.

    Args:
      program: pure and jittable.
      params: its first argument.
      bytes_per_value: what the program needs on a device for every value of a row of its first array; rows that would
        need more than `BUDGET` together go through in parts of equal size.
    """

    def __init__(self, program: Callable[..., Any], params: Any, *, bytes_per_value: int = 0):
        self._params = params
        self._bytes_per_value = bytes_per_value
        self._placed = functools.cache(functools.partial(self._place, program))

    def __call__(self, *rows: np.ndarray) -> Any:
        """The program's results, gathered on the host."""
        count, each = len(rows[0]), self._bytes_per_value * math.prod(rows[0].shape[1:])
        devices = math.gcd(count, jax.local_device_count())
        run, layout = self._placed(devices)
        parts = count // (devices * _at_once(count // devices, each)) if count else 1
        split = zip(*(np.split(array, parts) for array in rows), strict=True)
        results = [jax.device_get(run(*jax.device_put(part, layout))) for part in split]
        return jax.tree.map(lambda *found: np.concatenate(found), *results)

    def _place(self, program: Callable[..., Any], devices: int) -> tuple[Callable[..., Any], NamedSharding]:
        """The program on the first devices, with the parameters there, and the layout of its rows."""
        mesh = Mesh(np.array(jax.local_devices()[:devices]), ("data",))
        jitted = jax.jit(program, compiler_options=compiler_options(mesh))
        params = jax.device_put(self._params, NamedSharding(mesh, P()))
        return functools.partial(jitted, params), NamedSharding(mesh, P("data"))


def _at_once(rows: int, each: int) -> int:
    """The largest part of the rows of a device that divides them and fits, or 1."""
    return next(part for part in range(rows, 0, -1) if part == 1 or (rows % part == 0 and part * each <= BUDGET))
