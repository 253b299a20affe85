"""The flops of the matrix products and convolutions that a program is written with, counted before it is compiled.

XLA's own count of a compiled program leaves out what a GPU does in calls of a library (jax issue 22249), what a kernel
does, and all but one pass of a loop; `runtime.compiled_cost` reads what a compiled program tells.
"""

import math
from collections.abc import Iterator
from typing import Any


def product_flops(jaxpr: Any) -> float:
    """Additions and multiplications of all products, over all devices, in one run of a traced function.

    A scan counts as often as it runs, a loop of unknown length once, of the branches of a condition the one with the
    most, and of programs for several platforms the default: a search counts as XLA would do it, on every platform. A
    convolution over padding counts as if padding were pixels.

    Args:
      jaxpr: `jax.jit(function).trace(*arguments).jaxpr`.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (summed, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in summed)
        elif name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval.shape, parameters["dimension_numbers"].rhs_spec[0]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[features]
        elif name == "cond":
            branches, platforms = parameters["branches"], parameters.get("branches_platforms") or ()
            counted = [branches[platforms.index(None)]] if None in platforms else branches
            total += max(product_flops(branch) for branch in counted)
        elif name != "pallas_call":  # one program of its grid, on one tile
            times = parameters["length"] if name == "scan" else parameters["mesh"].size if name == "shard_map" else 1
            total += times * sum(product_flops(inner) for inner in _inner(parameters.values()))
    return total


def _inner(values: Any) -> Iterator[Any]:
    """The programs among the parameters of an operation."""
    for value in values:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)
