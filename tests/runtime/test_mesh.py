import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import fvq262k
from fvq_jax.config.checks import validate
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import BATCH, RULES, global_batch, make_mesh, mesh_shape, partition_spec, replicated
from fvq_jax.runtime.names import path_name
from fvq_jax.tasks.tokenizer.task import TokenizerTask
from fvq_jax.training.state import abstract_state, state_shardings
from tests.helpers.tiny import tiny_config

EVERYTHING = {"adversarial.weight": 0.5, "adversarial.layers": 2, "optim.ema_decay": 0.9}


@functools.cache
def state_of(codebook_rate=0.0, bridge="XS/2-d1"):
    """The abstract state with all that a run can have: discriminator, moving average, separate codebook rate."""
    config = tiny_config(
        **EVERYTHING | {"optim.codebook_learning_rate": codebook_rate, "tokenizer.quantizer.bridge": bridge}
    )
    mesh = make_mesh(2, 4)
    return abstract_state(TokenizerTask(config, mesh, 10, 1).init, mesh)


def names(state):
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(state)]


@pytest.mark.parametrize("codebook_rate", [0.0, 1e-3])
@pytest.mark.parametrize("bridge", ["XS/2-d1", "mlp5", "none"])
def test_every_array_of_the_state_matches_exactly_one_rule(codebook_rate, bridge):
    paths = names(state_of(codebook_rate, bridge))
    assert {"step", "skipped", "ema/quantizer/codebook", "networks/tokenizer/params/quantizer/codebook"} <= set(paths)
    for name in paths:
        assert sum(bool(re.search(pattern, name)) for pattern, _ in RULES) == 1, name


def test_every_rule_is_needed():
    paths = names(state_of())
    for pattern, _ in RULES:
        assert [name for name in paths if re.search(pattern, name)], pattern


@pytest.mark.parametrize("codebook_rate", [0.0, 1e-3])
def test_codebook_moments_and_average_are_cut_into_rows_and_nothing_else_is(codebook_rate):
    cut = [
        path_name(path)
        for path, leaf in jax.tree.leaves_with_path(state_of(codebook_rate))
        if leaf.sharding.spec != P()
    ]
    assert len(cut) == 4  # codebook, both moments, moving average
    assert all(name.endswith("/quantizer/codebook") for name in cut)
    assert sum("/mu/" in name for name in cut) == 1
    assert sum("/nu/" in name for name in cut) == 1
    assert sum(name.startswith("ema/") for name in cut) == 1


@pytest.mark.parametrize(
    "name", ["networks/tokenizer/params/quantizer/colours", "networks/generator/params/kernel", "codebook", ""]
)
def test_an_unknown_array_raises(name):
    with pytest.raises(ValueError, match="matches 0 sharding rules instead of one; see RULES"):
        partition_spec(name)


def test_an_array_of_two_rules_raises():
    with pytest.raises(ValueError, match="matches 2 sharding rules"):
        partition_spec("networks/tokenizer/params/encoder/quantizer/codebook")


def test_state_shardings_names_the_unknown_array():
    state = {"networks": {"tokenizer": {"params": {"lost": jnp.zeros(3)}}}}
    with pytest.raises(ValueError, match="networks/tokenizer/params/lost matches 0"):
        state_shardings(state, make_mesh(8, 1))


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


def test_the_codebook_axis_divides_the_rows_of_groups():
    """262,144 codes in 8 x 8 patches are 64 rows of patches, and no axis is longer; in runs of 64 codes 4,096."""

    def check(axis, groups="2d"):
        config = fvq262k.get_config()
        config.tokenizer.quantizer.bridge_groups = groups
        config.mesh.codebook = axis
        validate(config, 128)

    assert fvq262k.get_config().tokenizer.bridge == "L/8"
    check(64)
    check(128, groups="1d")
    message = "mesh.codebook 128 does not divide the 64 rows of groups of the codebook; allowed sizes: 1, 2, 4, 8, 16, "
    with pytest.raises(InputError, match=message + "32, 64$"):
        check(128)


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
