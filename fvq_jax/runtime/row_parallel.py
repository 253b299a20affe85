"""A jitted program over the rows of a batch, on the devices of this process; numpy in, numpy out."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
        self._program = jax.jit(program)
        self._params = params
        self._bytes_per_value = bytes_per_value
        self._placed = functools.cache(self._place)

    def __call__(self, *rows: np.ndarray) -> Any:
        """The program's results, gathered on the host."""
        count, each = len(rows[0]), self._bytes_per_value * math.prod(rows[0].shape[1:])
        devices = math.gcd(count, jax.local_device_count())
        params, layout = self._placed(devices)
        parts = count // (devices * _at_once(count // devices, each)) if count else 1

        def run(part: tuple[np.ndarray, ...]) -> Any:
            return jax.device_get(self._program(params, *jax.device_put(part, layout)))

        results = [run(part) for part in zip(*(np.split(array, parts) for array in rows), strict=True)]
        return jax.tree.map(lambda *found: np.concatenate(found), *results)

    def _place(self, devices: int) -> tuple[Any, NamedSharding]:
        mesh = Mesh(np.array(jax.local_devices()[:devices]), ("data",))
        return jax.device_put(self._params, NamedSharding(mesh, P())), NamedSharding(mesh, P("data"))


def _at_once(rows: int, each: int) -> int:
    """The largest part of the rows of a device that divides them and fits, or 1."""
    return next(part for part in range(rows, 0, -1) if part == 1 or (rows % part == 0 and part * each <= BUDGET))
