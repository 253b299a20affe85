"""The sweeps in configs/ablations: every point can be built, and varies what the file says."""

import functools
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from configs.ablations import base, mesh, usage_law
from fvq_jax.models.quantizers.bridge import make_bridge
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import dotted
from fvq_jax.sweep.points import make_points, read_sweep
from tests.helpers.tiny import make_step

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "ablations"
OTHERS = ("base", "__init__", "usage_law", "usage_recovery")  # the last two start from full_codebook.py and rivals.py
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS)
SIZES = ["", "smoke"]
COUNTS = {
    "bridge_depth": (3, 3),
    "bridge_kind": (10, 10),
    "bridge_width": (5, 5),
    "code_dim": (9, 5),
    "codebook_size": (6, 4),
    "group_size": (15, 6),
    "mesh": (4, 4),
    "schedule": (3, 3),
}


def config_of(name, arg):
    return importlib.import_module(f"configs.ablations.{name}").get_config(arg)


@functools.cache
def points_of(name, arg=""):
    return make_points(config_of(name, arg), read_sweep(f"{FOLDER / name}.py:{arg}"), pathlib.Path("sweep"))


def values_of(name, arg, field):
    return list(dict.fromkeys(point.overrides[field] for point in points_of(name, arg)))


@functools.cache
def bridge_shape(codes, code_dim, bridge, groups):
    """The bridged codebook's shape, by tracing alone."""
    module, codebook = make_bridge(bridge, groups, jnp.float32), jax.ShapeDtypeStruct((codes, code_dim), jnp.float32)
    return (
        codebook.shape
        if module is None
        else jax.eval_shape(module.init_with_output, jax.random.key(0), codebook)[0].shape
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arg", SIZES)
def test_every_point_is_valid_and_its_codebook_can_be_made(name, arg):
    points = points_of(name, arg)
    assert len(points) == COUNTS[name][SIZES.index(arg)]
    for point in points:
        assert point.refused == "", point.name
        config = point.config
        shape = (config["tokenizer.quantizer.codebook_size"], config["tokenizer.quantizer.code_dim"])
        assert (
            bridge_shape(*shape, config["tokenizer.quantizer.bridge"], config["tokenizer.quantizer.bridge_groups"])
            == shape
        )


def test_the_list_of_sweeps_is_complete():
    listed = re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs" / "sweeps.md").read_text(), flags=re.MULTILINE)
    assert {name: int(points) for name, points in listed} == {name: COUNTS[name][0] for name in NAMES} | {
        "usage_law": 18,
        "usage_recovery": 20,  # see test_rivals.py
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arg", SIZES)
def test_a_sweep_changes_its_config_and_little_else(name, arg):
    configs = {str(point.config) for point in points_of(name, arg)}
    assert len(configs) == len(points_of(name, arg))
    shared = dotted(config_of("mesh", arg)) if name == "mesh" else dotted(base.get_config(arg))
    for point in points_of(name, arg):
        changed = {field for field in shared if point.config[field] != shared[field]}
        assert changed <= point.overrides.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_small_size_needs_no_data_and_is_short(name):
    for point in points_of(name, "smoke"):
        assert point.config["data.source"] == "photos"
        assert point.config["loss.perceptual_weight"] == point.config["adversarial.weight"] == 0
        assert point.config["steps"] <= 200
        assert point.config["data.image_size"] <= 32


@pytest.mark.parametrize("arg", SIZES)
def test_the_training_state_of_the_base_can_be_made(arg):
    config = base.get_config(arg)
    config.loss.perceptual_weight = 0.0  # its weight files are not here, and it has no state
    codebook = make_step(config, make_mesh(-1, 1)).abstract().networks["tokenizer"].params
    assert codebook["quantizer"]["codebook"].shape == ((256, 16) if arg else (16384, 256))


def test_the_values_of_the_paper():
    assert values_of("bridge_kind", "", "tokenizer.quantizer.bridge") == ["none", "linear", "mlp5", "L/4", "dit-L/4"]
    assert values_of("bridge_kind", "", "optim.decay") == ["linear", "constant"]
    assert values_of("bridge_depth", "", "tokenizer.quantizer.bridge") == ["L/4-d1", "L/4", "L/4-d4"]
    assert values_of("code_dim", "", "tokenizer.quantizer.code_dim") == [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert values_of("codebook_size", "", "tokenizer.quantizer.codebook_size") == [
        1024,
        4096,
        16384,
        65536,
        262144,
        1048576,
    ]
    assert values_of("schedule", "", "optim.decay") == ["linear", "cosine", "constant"]


@pytest.mark.parametrize("arg", SIZES)
def test_the_law_of_usage_takes_every_group_with_both_starts_in_one_network(arg, tmp_path):
    config = usage_law.get_config(arg)
    if config.data.source == "folder":
        config.data.train_dir = config.data.eval_dir = str(tmp_path)
    points = make_points(config, read_sweep(usage_law.__file__), pathlib.Path("sweep"))
    assert [point.refused for point in points] == [""] * 18
    quantizer = "tokenizer.quantizer."
    varied = [
        [point.config[quantizer + name] for name in ("codebook_size", "bridge", "restart_after")] for point in points
    ]
    assert varied[::2] == [
        [codes, f"S/{patch}", 0.0] for codes, patches in usage_law.GROUPS.items() for patch in patches
    ]
    assert varied[1::2] == [[codes, bridge, usage_law.RESTART] for codes, bridge, _ in varied[::2]]
    assert all(codes // int(bridge[2:]) ** 2 <= 4096 for codes, bridge, _ in varied)
    assert (
        len({str({name: point.config[name] for name in point.config if quantizer not in name}) for point in points})
        == 1
    )
    if not arg:  # every window has as many tokens as the file says
        assert {point.config["log.every_steps"] * point.config["batch_size"] * 256 for point in points} == {131072}


def test_meshes_use_all_devices_and_say_so():
    for devices, shapes in ((8, [(8, 1), (4, 2), (2, 4), (1, 8)]), (6, [(6, 1), (3, 2)]), (1, [(1, 1)])):
        points = points_of("mesh", f"devices={devices}")
        assert [(point.config["mesh.data"], point.config["mesh.codebook"]) for point in points] == shapes
        assert {point.devices for point in points} == {devices}


def test_codebooks_of_every_size_can_be_divided():
    config = base.get_config()
    config.mesh.codebook = 32
    config.batch_size = config.eval.batch_size = 128
    points = make_points(config, read_sweep(str(FOLDER / "codebook_size.py")), pathlib.Path("sweep"))
    assert all(point.refused == "" for point in points)


def test_an_unknown_argument_is_refused():
    with pytest.raises(InputError, match="unknown config argument 'smok'"):
        base.get_config("smok")
    with pytest.raises(InputError, match="this config takes smoke, devices"):
        mesh.get_config("batch=3")
