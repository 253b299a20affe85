"""The mesh, and one table that says how every array of the training state is laid out on it.

Axes: `data` (copies of the codebook) and `codebook` (its rows). The batch is sharded over both.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.errors import InputError

BATCH = P(("data", "codebook"))

# (pattern found in a path such as networks/tokenizer/params/quantizer/codebook, layout). Optimizer moments and
# moving averages carry the path of their parameter, so they follow it. Every array must match exactly one row.
RULES: tuple[tuple[str, P], ...] = (
    (r"/quantizer/codebook$", P("codebook")),
    (r"/quantizer/bridge_net/", P()),
    (r"/(encoder|decoder|quant_conv|post_quant_conv)/", P()),
    (r"^networks/discriminator/(params|batch_stats)/", P()),
    (r"^networks/discriminator/opt_state/.*/(mu|nu)/", P()),
    (r"(^|/)(step|skipped|count)$", P()),
)


def mesh_shape(data: int, codebook: int, devices: int) -> tuple[int, int]:
    """Sizes of both axes over that many devices; one may be given as -1: what is left.

    Raises:
      InputError: the sizes are no mesh, or not one of that many devices.
    """
    given = f"mesh.data={data}, mesh.codebook={codebook}"
    if min(data, codebook) < -1 or 0 in (data, codebook) or data == codebook == -1:
        raise InputError(f"{given}: both sizes must be positive, and at most one of them -1 (all devices left)")
    shape = (devices // codebook if data == -1 else data, devices // data if codebook == -1 else codebook)
    if shape[0] * shape[1] != devices:
        raise InputError(
            f"{given} does not fit {devices} devices: the product must be {devices}, and -1 stands for what is left"
        )
    return shape


def make_mesh(data: int, codebook: int) -> Mesh:
    """A mesh of all devices of all processes; see `mesh_shape` for the sizes and errors."""
    shape = mesh_shape(data, codebook, jax.device_count())
    return jax.make_mesh(shape, ("data", "codebook"), axis_types=(AxisType.Auto,) * 2)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree` as text: networks/tokenizer/params/encoder/..."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_spec(name: str) -> P:
    """The layout of the array with this path. ValueError unless exactly one rule matches."""
    found = [spec for pattern, spec in RULES if re.search(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"{name} matches {len(found)} sharding rules instead of one; see RULES in fvq_jax/sharding.py")
    return found[0]


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every array of a (possibly abstract) state, by the rule table."""
    return jax.tree.map_with_path(lambda path, _: NamedSharding(mesh, partition_spec(path_name(path))), state)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Each process's rows as one array over the whole mesh, batch dimension sharded over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of an array that every device holds whole."""
    return NamedSharding(mesh, P())
