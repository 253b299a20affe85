import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import BATCH, global_batch, make_mesh, mesh_shape, partition_spec, replicated, shardings

RULES = ((r"/quantizer/codebook$", P("codebook")), (r"/encoder/", P()), (r"(^|/)step$", P()))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("networks/tokenizer/params/quantizer/codebook", P("codebook")),
        ("networks/tokenizer/opt_state/1/mu/quantizer/codebook", P("codebook")),
        ("networks/tokenizer/params/encoder/conv/kernel", P()),
        ("step", P()),
    ],
)
def test_the_layout_of_an_array_is_that_of_its_rule(name, spec):
    assert partition_spec(name, RULES) == spec


@pytest.mark.parametrize(
    "name", ["networks/tokenizer/params/quantizer/colours", "networks/generator/params/kernel", "codebook", "steps", ""]
)
def test_an_unknown_array_raises(name):
    with pytest.raises(ValueError, match=f"^{name} matches 0 sharding rules instead of one; the rules: .*/encoder/"):
        partition_spec(name, RULES)


def test_an_array_of_two_rules_raises():
    with pytest.raises(ValueError, match="matches 2 sharding rules"):
        partition_spec("networks/tokenizer/params/encoder/quantizer/codebook", RULES)


def test_every_array_of_a_tree_has_the_layout_of_its_rule():
    mesh = make_mesh(2, 4)
    tree = {"step": jnp.zeros(()), "quantizer": [{"quantizer": {"codebook": jnp.zeros((8, 2))}}]}
    expected = {
        "step": NamedSharding(mesh, P()),
        "quantizer": [{"quantizer": {"codebook": NamedSharding(mesh, P("codebook"))}}],
    }
    assert shardings(tree, mesh, RULES) == expected


def test_the_unknown_array_of_a_tree_is_named():
    state = {"networks": {"tokenizer": {"params": {"lost": jnp.zeros(3)}}}}
    with pytest.raises(ValueError, match="networks/tokenizer/params/lost matches 0"):
        shardings(state, make_mesh(8, 1), RULES)


@pytest.mark.parametrize(
    ("given", "expected"), [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((1, 8), (1, 8)), ((2, 4), (2, 4))]
)
def test_meshes(given, expected):
    mesh = make_mesh(*given)
    assert mesh_shape(*given, 8) == expected
    assert (mesh.shape["data"], mesh.shape["codebook"]) == expected
    assert mesh.axis_names == ("data", "codebook")
    assert mesh.size == 8


@pytest.mark.parametrize("given", [(3, -1), (-1, 3), (2, 2), (16, 1), (1, 16), (-1, 16), (16, -1)])
def test_meshes_that_do_not_fit_the_devices_are_refused(given):
    message = f"mesh.data={given[0]}, mesh.codebook={given[1]} does not fit 8 devices: the product must be 8"
    with pytest.raises(InputError, match=message):
        make_mesh(*given)


@pytest.mark.parametrize("given", [(-1, -1), (0, 1), (1, 0), (-2, 1), (1, -8), (0, -1)])
def test_sizes_that_are_no_mesh_are_refused(given):
    with pytest.raises(InputError, match="both sizes must be positive, and at most one of them -1"):
        make_mesh(*given)


@dataclasses.dataclass(frozen=True)
class OfSlice:
    """A device as `make_mesh` sees it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def slices_of(mesh):
    return [[device.slice_index for device in row] for row in mesh.devices]


def test_some_devices():
    assert make_mesh(-1, 2, devices=jax.devices()[4:]).devices.tolist() == [jax.devices()[4:6], jax.devices()[6:]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [((-1, 4), [[0] * 4, [1] * 4]), ((-1, 2), [[0] * 2] * 2 + [[1] * 2] * 2), ((8, 1), [[0]] * 4 + [[1]] * 4)],
)
def test_the_codebook_axis_stays_inside_a_slice_and_data_spans_them(given, expected):
    devices = [OfSlice(id, slice_index=id % 2) for id in range(8)]  # as they come they alternate
    mesh = make_mesh(*given, devices=devices)
    assert slices_of(mesh) == expected
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(("given", "size"), [((1, 12), 12), ((1, -1), 12), ((3, 4), 4)])
def test_a_codebook_axis_that_leaves_its_slice_is_refused(given, size):
    devices = [OfSlice(id, slice_index=id // 6) for id in range(12)]
    message = (
        f"mesh.codebook={size} does not stay inside one slice.* 2 slices has 6 devices; allowed sizes: 1, 2, 3, 6$"
    )
    with pytest.raises(InputError, match=message):
        make_mesh(*given, devices=devices)


TOPOLOGIES = """
import json
from jax.experimental import topologies
from fvq_jax.runtime.mesh import make_mesh

def devices(name, **options):
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices

mesh = make_mesh(-1, 4, devices=devices("v5e:2x2", num_slices=2))
slices = [[device.slice_index for device in row] for row in mesh.devices]
shapes = [make_mesh(8, -1, devices=devices(name)).devices.shape for name in ("v6e:4x4", "v5p:4x4x4")]
print(json.dumps([slices, shapes]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'fvq_jax[tpu]'")
def test_meshes_of_real_tpu_slices():
    """Two slices of 2 x 2 chips; and axes of 8 x 2 and 8 x 8 on tori whose sides are all 4, which must be split."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", TOPOLOGIES]
    done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[[0] * 4, [1] * 4], [[8, 2], [8, 8]]]


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)])
def test_a_global_batch_is_spread_over_all_devices_in_order(sizes):
    mesh = make_mesh(*sizes)
    rows = {"image": np.arange(16 * 3).reshape(16, 3), "mask": np.arange(16) < 11}
    batch = global_batch(rows, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, rows[name])
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, BATCH), array.ndim)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
    assert len({shard.device for shard in batch["image"].addressable_shards}) == 8


def test_replicated():
    array = jax.device_put(jnp.arange(3), replicated(make_mesh(2, 4)))
    assert [shard.data.shape for shard in array.addressable_shards] == [(3,)] * 8
