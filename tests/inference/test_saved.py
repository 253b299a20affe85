import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fvq_jax.inference.saved import SavedTokenizer, load, load_params, save_folder
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import flatten
from fvq_jax.training.checkpoint import Checkpoints
from fvq_jax.training.state import NetworkState, TrainState
from tests.helpers.random_tokenizer import random_tokenizer
from tests.helpers.trained_workdir import trained_workdir

TABLE = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)


def bridged(**options):
    saved = random_tokenizer(**{"bridge": "XS/2", "bridge_groups": "1d", "ch_mult": (1,), **options})
    return SavedTokenizer(saved.net, saved.params, TABLE)


def assert_same_params(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize("options", [{}, {"bridge": "dit-XS/4-d1", "bridge_groups": "2d", "l2_normalize": True}])
def test_a_folder_gives_back_everything(options, tmp_path):
    saved = bridged(**options)
    save_folder(tmp_path / "out", saved)
    back = load(tmp_path / "out")
    assert back.net == saved.net
    assert_same_params(back.params, saved.params)
    np.testing.assert_array_equal(back.folded, TABLE, strict=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "bridge.safetensors",
        "config.json",
        "weights.safetensors",
    ]


def test_the_weights_alone_are_the_folded_tokenizer(tmp_path):
    saved = bridged()
    save_folder(tmp_path, saved)
    weights = safetensors.numpy.load_file(tmp_path / "weights.safetensors")
    assert not [name for name in weights if "bridge" in name]
    np.testing.assert_array_equal(weights["quantizer/codebook"], TABLE)
    (tmp_path / "bridge.safetensors").unlink()
    back = load(tmp_path)
    assert back.net == saved.net.clone(quantizer=saved.net.quantizer.folded())
    assert_same_params(back.params, {**saved.params, "quantizer": {"codebook": TABLE}})
    # And saved over the bridged one, it leaves no bridge behind.
    save_folder(tmp_path, saved)
    save_folder(tmp_path, back)
    assert load(tmp_path).net.quantizer.bridge == "none"


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_workdir_gives_its_moving_average_if_it_has_one(ema_decay, tmp_path):
    saved = trained_workdir(tmp_path, ema_decay=ema_decay)
    back = load(tmp_path)
    assert back.net == saved.net
    factor = 2 if ema_decay else 1
    assert_same_params(back.params, jax.tree.map(lambda leaf: factor * leaf, saved.params))


def test_a_workdir_with_region_loss_keeps_its_bridge(tmp_path):
    """Its state says only when a code was chosen last, so the codebook before the bridge can still be trained."""
    saved = trained_workdir(tmp_path, region_window=3)
    loaded = load(tmp_path)
    assert loaded.net.quantizer == saved.net.quantizer
    assert_same_params(loaded.params, saved.params)


def test_a_single_checkpoint_of_a_workdir_is_read(tmp_path):
    saved = trained_workdir(tmp_path)
    state = jax.tree.map(jnp.asarray, {"tokenizer": NetworkState(saved.params, {}, {})})
    zero = jnp.zeros((), jnp.int32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(zero, zero, jax.tree.map(lambda leaf: 3 * leaf, state), {}), 7, {})
    for path, factor in (("", 3), ("checkpoints/step_7", 3), ("checkpoints/step_0", 1)):
        assert_same_params(load(tmp_path / path).params, jax.tree.map(lambda leaf, by=factor: by * leaf, saved.params))
    assert_same_params(load_params(tmp_path / "checkpoints" / "step_0", saved.net), saved.params)
    with pytest.raises(InputError, match=r"no checkpoint of step 5 in .*: its checkpoints are of step 0, 7$"):
        load(tmp_path / "checkpoints" / "step_5")


def test_a_workdir_whose_config_was_changed_is_refused(tmp_path):
    trained_workdir(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"code_dim": 8', '"code_dim": 4'))
    with pytest.raises(
        InputError,
        match=r"checkpoint of step 0 in .* does not fit: .*quantizer/codebook \[64, 8\] instead of \[64, 4\]",
    ):
        load(tmp_path)


def test_a_training_run_is_not_overwritten(tmp_path):
    trained_workdir(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match="holds a training run"):
        save_folder(tmp_path, bridged())
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"cannot read .*config\.json: No such file"),
        (lambda path: (path / "config.json").write_text("{"), r"config\.json is damaged"),
        (
            lambda path: (path / "config.json").write_text("[]"),
            r"config\.json is damaged: it does not hold names and values",
        ),
        (lambda path: (path / "config.json").write_text("{}"), "not the config of a tokenizer"),
        (lambda path: edit(path, "ch", None), r"config\.json does not describe a tokenizer: 'ch'"),
        (lambda path: edit(path, "bridge", "S/3"), "64 codes are not divisible by groups of 9"),
        (lambda path: edit(path, "name", "fancy"), "unknown quantizer 'fancy'"),
        (
            lambda path: edit(path, "z_channels", 8),
            r"weights\.safetensors does not hold.*of another shape: .*\[1, 1, 16, 8\]",
        ),
        (lambda path: (path / "weights.safetensors").write_bytes(b"1234"), r"weights\.safetensors is damaged"),
        (lambda path: (path / "bridge.safetensors").write_bytes(b"1234"), r"bridge\.safetensors is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, message, tmp_path):
    save_folder(tmp_path, bridged())
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def edit(path, field, value):
    config = json.loads((path / "config.json").read_text())
    section = config["tokenizer"] if field in config["tokenizer"] else config["tokenizer"]["quantizer"]
    section[field] = value
    if value is None:
        del section[field]
    (path / "config.json").write_text(json.dumps(config))


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer at .*nowhere: the path does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither weights\.safetensors .* nor config\.json and checkpoints/"):
        load(tmp_path)
    save_folder(tmp_path, bridged())
    assert load(tmp_path, l2_norm=False).net.quantizer.l2_normalize is False
    with pytest.raises(InputError, match=r"l2_norm=True contradicts .*config\.json, which says False"):
        load(tmp_path, l2_norm=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the folder"):
        save_folder(tmp_path / "file", bridged())


def test_the_workdir_of_a_generator_is_no_tokenizer(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"task": "generator", "generator": {}}')
    with pytest.raises(InputError, match="does not describe a tokenizer: it has no section 'tokenizer'"):
        load(tmp_path)
