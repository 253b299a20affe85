"""The mesh of devices, and how arrays are laid out on it by a table of rules.

Axes: `data` (along it the codebook is copied) and `codebook` (along it the codebook's rows are divided). The batch is
divided over both. The rules come from the owners of the arrays: a task and its quantizer.
"""

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import path_name

BATCH = P(("data", "codebook"))

# (pattern found in a path such as networks/tokenizer/params/quantizer/codebook, layout)
Rules = Sequence[tuple[str, P]]


def mesh_shape(data: int, codebook: int, devices: int) -> tuple[int, int]:
    """Sizes of both axes for that many devices; one of them may be given as -1: all devices that are left.

    Raises:
      InputError: the sizes make no mesh, or a mesh of another number of devices.
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


def make_mesh(data: int, codebook: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these devices (default: all, of all processes); neighbours on the mesh are close in the network.

    Slices (the TPUs of one pod slice, the GPUs joined by NVLink) are connected by a slower network. So the `codebook`
    axis, along which latents and codes are sent in every step, stays inside one slice, and `data` spans all slices.

    Raises:
      InputError: see `mesh_shape`; or the `codebook` axis does not fit into a slice.
    """
    devices = jax.devices() if devices is None else devices
    data, codebook = mesh_shape(data, codebook, len(devices))
    slices = collections.defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    each = len(devices) // len(slices)
    if each % codebook:
        allowed = ", ".join(str(size) for size in range(1, each + 1) if each % size == 0)
        raise InputError(
            f"mesh.codebook={codebook} does not stay inside one slice: each of the {len(slices)} slices has {each} "
            f"devices; allowed sizes: {allowed}"
        )
    inside = (data // len(slices), codebook)
    # Physical axes of a TPU are split where the sizes need it, and only there.
    parts = [
        mesh_utils.create_device_mesh(inside, slices[index], allow_split_physical_axes=True) for index in sorted(slices)
    ]
    return Mesh(np.concatenate(parts), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2)


def partition_spec(name: str, rules: Rules) -> P:
    """The layout of the array with this path. ValueError unless exactly one rule matches."""
    found = [spec for pattern, spec in rules if re.search(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"{name} matches {len(found)} sharding rules instead of one; the rules: {rules}")
    return found[0]


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The `NamedSharding` of every array of a (possibly abstract) tree, by the rules."""
    return jax.tree.map_with_path(lambda path, _: NamedSharding(mesh, partition_spec(path_name(path), rules)), tree)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the rows of all processes to arrays over the whole mesh, with rows divided over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def local_rows(rows: jax.Array) -> np.ndarray:
    """This process's rows of an array whose rows are divided over the mesh, in order."""
    shards = sorted(rows.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of an array that every device holds whole."""
    return NamedSharding(mesh, P())
