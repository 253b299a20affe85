import functools
import importlib
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from fvq_jax.config.checks import all_fields, validate
from fvq_jax.config.effects import refuse_misleading, too_late, without_effect
from fvq_jax.models.quantizers.bridge import make_bridge
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.mesh import make_mesh
from fvq_jax.runtime.names import dotted
from fvq_jax.sweep.points import make_points, read_sweep
from fvq_jax.tasks import task_of
from fvq_jax.tasks.tokenizer.fields import downsampling
from fvq_jax.training.optim import Annealing
from tests.helpers.tiny import make_step

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "__init__"))
PAPER = ["fvq16k", "fvq262k", "fvq65k"]
GENERATORS = sorted({"generate", "llamagen"} & set(NAMES))
TOKENIZERS = [name for name in NAMES if name not in GENERATORS]


def get_config(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def check(config, devices):
    validate(config, task_of(config), devices)


def differences(a, b):
    a, b = dotted(a), dotted(b)
    return {name: b[name] for name in a if a[name] != b[name]}


@functools.cache
def state_of(name, arg="", codebook_axis=1):
    config = get_config(name, arg)
    if "loss" in config:
        config.loss.perceptual_weight = 0.0  # its weight files are not here, and it has no state
    return make_step(config, make_mesh(-1, codebook_axis)).abstract()


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def test_all_configs_are_here():
    assert set(NAMES) >= {"quickstart", "llamagen", *PAPER}
    assert {name for name in NAMES if get_config(name).task == "generator"} == set(GENERATORS)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_config_is_valid(name):
    config = get_config(name)
    assert config.is_locked
    sources = {"quickstart": "photos"} | dict.fromkeys(("photographs", "full_codebook", "rivals", "small"), "folder")
    assert config.data.source == sources.get(name, "tfds")
    if config.data.source == "folder":
        config.data.train_dir, config.data.eval_dir = "train", "eval"
    for devices in (1, 2, 8):
        check(config, devices)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("source", ["folder", "array_record"])
def test_configs_of_the_paper_take_folders_once_told_so(name, source):
    config = get_config(name)
    config.update_from_flattened_dict({"data.train_dir": "train", "data.eval_dir": "eval"})
    with pytest.raises(InputError, match=r"train_dir is set, but data\.source=tfds .* --config\.data\.source=folder"):
        check(config, 8)
    config.data.source = source
    check(config, 8)


def test_the_paper_is_trained_on_imagenet():
    data = get_config("fvq16k").data
    assert (data.tfds_name, data.train_split, data.eval_split) == ("imagenet2012", "train", "validation")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_smoke_size_is_valid_and_needs_no_data(name):
    config = get_config(name, "smoke")
    assert config.is_locked
    assert config.data.source == "photos"
    assert config.loss.perceptual_weight == 0
    assert config.steps <= 10
    for devices in (1, 2, 8):
        check(config, devices)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arg", ["", "smoke", "batch=64", "smoke,batch=16"])
def test_no_config_has_a_field_without_effect_or_beyond_its_last_step(name, arg):
    config = get_config(name, arg)
    fields = all_fields(task_of(config), config)
    refuse_misleading(config, fields)
    assert without_effect(config, fields) == []
    total = config.steps or int(config.epochs * 1_281_167) // config.batch_size  # epochs of ImageNet
    assert too_late(config, fields, total) == []


@pytest.mark.parametrize("name", PAPER)
def test_the_number_of_pictures_scales_what_counts_in_steps(name):
    changed = differences(get_config(name), get_config(name, "pictures=64058"))
    assert changed == {"adversarial.start": 1000, "eval.every_steps": 500, "checkpoint.every_steps": 250}
    assert get_config(name, "pictures=5").adversarial.start == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("arg", ["", "smoke"])
def test_the_training_state_of_every_config_can_be_made(name, arg):
    state = state_of(name, arg)
    config = get_config(name, arg)
    codebook = state.networks["tokenizer"].params["quantizer"]["codebook"]
    assert codebook.shape == (config.tokenizer.quantizer.codebook_size, config.tokenizer.quantizer.code_dim)
    assert ("discriminator" in state.networks) == (config.adversarial.weight > 0)
    if arg == "smoke":
        assert count(state.networks["tokenizer"].params) < 2e6


@pytest.mark.parametrize(
    ("bridge", "small"),
    [("XL/8-d3", "S/8-d3"), ("dit-L/4", "dit-S/4"), ("dit-XS/2", "dit-XS/2"), ("B/16", "S/16"), ("mlp5", "mlp5")],
)
def test_the_smoke_size_keeps_the_kind_of_bridge_and_makes_it_small(bridge, small):
    config = importlib.import_module("configs.fvq16k").get_config("smoke", bridge=bridge)
    assert config.tokenizer.quantizer.bridge == small
    check(config, 8)
    codebook = jnp.zeros((config.tokenizer.quantizer.codebook_size, config.tokenizer.quantizer.code_dim))
    params = jax.eval_shape(make_bridge(small, "2d", jnp.float32).init, jax.random.key(0), codebook)
    assert 0 < count(params) < 1e6


@pytest.mark.parametrize("name", PAPER)
def test_codebooks_of_the_paper_can_be_cut_over_eight_devices(name):
    config = get_config(name)
    config.mesh.codebook = 8
    check(config, 8)
    codebook = state_of(name, codebook_axis=8).networks["tokenizer"].params["quantizer"]["codebook"]
    assert codebook.sharding.shard_shape(codebook.shape) == (codebook.shape[0] // 8, codebook.shape[1])


def test_parameter_counts_of_the_main_recipe():
    networks = state_of("fvq16k").networks
    params = networks["tokenizer"].params
    assert {name: count(part) for name, part in params.items()} == {
        "encoder": 29_298_176,
        "quant_conv": 256 * 256 + 256,
        "quantizer": 16384 * 256 + 3_153_664,  # codebook and bridge
        "post_quant_conv": 256 * 256 + 256,
        "decoder": 42_449_795,
    }
    assert count(params) == 79_227_523
    assert count(networks["discriminator"].params) == 2_765_633


def test_larger_codebooks_differ_from_the_main_recipe_in_few_fields():
    base = get_config("fvq16k")
    assert differences(base, get_config("fvq262k")) == {
        "tokenizer.quantizer.codebook_size": 262144,
        "tokenizer.quantizer.bridge": "L/8",
    }
    assert differences(base, get_config("fvq65k")) == {
        "tokenizer.quantizer.codebook_size": 65536,
        "tokenizer.quantizer.code_dim": 512,
        "tokenizer.quantizer.bridge": "L/8",
        "epochs": 120.0,
    }


@pytest.mark.parametrize("name", PAPER)
def test_a_batch_scales_the_rate_and_what_counts_in_steps(name):
    assert get_config(name).batch_size == 128
    assert get_config(name).optim.learning_rate == 1e-4
    changed = differences(get_config(name), get_config(name, "batch=512"))
    assert changed == {
        "batch_size": 512,
        "optim.learning_rate": pytest.approx(4e-4),
        "eval.batch_size": 512,
        "adversarial.start": 5000,
        "eval.every_steps": 2500,
        "checkpoint.every_steps": get_config(name).checkpoint.every_steps // 4,
    }
    assert get_config(name, "batch=64").eval.batch_size == 128
    assert differences(get_config(name), get_config(name, "batch=128")) == {}
    small = get_config(name, "smoke,batch=16")
    assert small.batch_size == 16
    assert small.optim.learning_rate == pytest.approx(1e-4 / 8)
    assert small.adversarial.start == 2  # the smoke size has a batch of 8 and starts at 4


def test_quickstart_scales_from_its_own_batch():
    base = get_config("quickstart")
    assert differences(base, get_config("quickstart", f"batch={base.batch_size}")) == {}
    changed = differences(base, get_config("quickstart", f"batch={2 * base.batch_size}"))
    assert changed == {
        "batch_size": 2 * base.batch_size,
        "optim.learning_rate": pytest.approx(2 * base.optim.learning_rate),
        "eval.every_steps": base.eval.every_steps // 2,
        "checkpoint.every_steps": base.checkpoint.every_steps // 2,
    }


def test_a_batch_below_the_devices_is_refused_with_the_smallest_that_works():
    with pytest.raises(InputError, match="batch_size 4 is below 8 devices: the smallest that works is 8"):
        check(get_config("fvq16k", "smoke,batch=4"), 8)


def test_photographs_sweeps_over_the_bridge_alone():
    runs = make_points(get_config("photographs"), read_sweep(str(FOLDER / "photographs.py")), pathlib.Path("sweep"))
    assert [run.overrides for run in runs] == [
        {"tokenizer.quantizer.bridge": name} for name in ("none", "linear", "S/2")
    ]
    assert {run.config["steps"] for run in runs} == {1000}
    assert get_config("photographs", "bridge=none").tokenizer.quantizer.bridge == "none"


@pytest.mark.parametrize(
    ("codes", "bridge", "tokens"),
    [(4096, "S/2", 256), (16384, "S/4", 256), (65536, "S/8", 256), (262144, "S/8", 1024), (1048576, "S/16", 1024)],
)
def test_groups_and_tokens_of_a_full_codebook_grow_with_it(codes, bridge, tokens):
    config = get_config("full_codebook", f"codes={codes}")
    quantizer = config.tokenizer.quantizer
    assert (quantizer.codebook_size, quantizer.bridge, quantizer.restart_after) == (codes, bridge, 2)
    assert (config.data.image_size // downsampling(config)) ** 2 == tokens
    assert config.eval.crops * tokens == codes * (16 if codes <= 65536 else 4)
    assert quantizer.search_implementation == ("auto" if codes <= 65536 else "tree")
    config.data.train_dir, config.data.eval_dir = "train", "eval"
    check(config, 8)
    other = get_config("full_codebook", f"codes={codes},bridge=linear")
    assert differences(config, other) == {
        **{"tokenizer.quantizer.bridge": "linear", "data.train_dir": "", "data.eval_dir": ""},
    }


@pytest.mark.parametrize(("codes", "bridge"), [(16384, "S/4"), (262144, "S/8")])
def test_a_full_codebook_runs_beside_no_bridge_and_a_linear_one_with_every_seed(codes, bridge):
    config = get_config("full_codebook", f"codes={codes}")
    config.data.train_dir = config.data.eval_dir = str(FOLDER)
    points = make_points(config, read_sweep(f"{FOLDER / 'full_codebook.py'}:codes={codes},seeds=2"), FOLDER)
    assert [point.refused for point in points] == [""] * 6
    bridges = [point.config["tokenizer.quantizer.bridge"] for point in points]
    assert [(name, point.config["seed"]) for name, point in zip(bridges, points, strict=True)] == [
        *((name, 0) for name in (bridge, "none", "linear")),
        *((name, 1) for name in (bridge, "none", "linear")),
    ]
    assert {point.config["tokenizer.quantizer.codebook_size"] for point in points} == {codes}
    linear = read_sweep(f"{FOLDER / 'full_codebook.py'}:codes={codes},bridge=linear")
    assert len(make_points(config, linear, FOLDER)) == 2  # it is one of the others


@pytest.mark.parametrize(("size", "batch"), [(32, 32), (64, 8), (128, 2), (256, 2)])
def test_small_takes_crops_of_any_size_and_fewer_large_ones(size, batch):
    config = get_config("small", f"size={size}")
    assert (config.data.image_size, config.data.resize_min, config.batch_size) == (size, size, batch)
    assert config.data.resize_max > size
    config.data.train_dir, config.data.eval_dir = "train", "eval"
    check(config, 2)
    assert differences(config, get_config("small", f"size={size},batch={batch}")) == {
        **{"data.train_dir": "", "data.eval_dir": ""},
    }


@pytest.mark.parametrize("bridge", ["none", "linear", "XL/8-d4", "dit-B/8"])
@pytest.mark.parametrize("size", ["", ",smoke"])
def test_quickstart_takes_a_bridge(bridge, size):
    config = get_config("quickstart", f"bridge={bridge}{size}")
    assert config.tokenizer.quantizer.bridge == (bridge.replace("XL", "S").replace("B", "S") if size else bridge)
    check(config, 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("smok", "unknown config argument 'smok': this config takes .*smoke.*batch"),
        ("steps=3", "unknown config argument 'steps'"),
        ("batch=many", "config argument 'batch' must be int, not 'many'"),
        ("batch", "config argument 'batch' must be int, not ''"),
        ("batch=0", "config argument 'batch' must be above 0, not 0"),
        ("batch=-8", "config argument 'batch' must be above 0, not -8"),
        ("smoke=2", "config argument 'smoke' must be bool, not '2'"),
    ],
)
def test_unknown_and_impossible_arguments_are_refused(name, arg, message):
    with pytest.raises(InputError, match=message):
        get_config(name, arg)


def test_flags_can_be_given_a_value():
    assert differences(get_config("fvq16k", "smoke"), get_config("fvq16k", "smoke=true")) == {}
    assert differences(get_config("fvq16k"), get_config("fvq16k", "smoke=false")) == {}


def from_command_line(monkeypatch, *overrides):
    """A config with overrides as the program reads them."""
    values = flags.FlagValues()
    monkeypatch.setattr(sys, "argv", ["program", *overrides])  # config_flags looks there
    config_flags.DEFINE_config_dict("config", get_config("fvq16k", "smoke"), flag_values=values)
    values(sys.argv)
    return values.config


@pytest.mark.parametrize("text", ["1,2", "(1, 2)", "[1,2]"])
def test_levels_can_be_given_on_the_command_line(monkeypatch, text):
    config = from_command_line(monkeypatch, f"--config.tokenizer.ch_mult={text}")
    assert config.tokenizer.ch_mult == (1, 2)
    check(config, 8)


@pytest.mark.parametrize(("text", "named"), [("abc", "'abc'"), ("1.5,2", "1.5"), ("()", r"\(\)"), ("1,0", "0")])
def test_levels_that_are_no_whole_numbers_are_refused(monkeypatch, text, named):
    config = from_command_line(monkeypatch, f"--config.tokenizer.ch_mult={text}")
    with pytest.raises(InputError, match=f"tokenizer.ch_mult must be positive whole numbers such as .*{named}"):
        check(config, 8)


def test_numbers_on_the_command_line_keep_their_type(monkeypatch):
    config = from_command_line(monkeypatch, "--config.optim.learning_rate=1", "--config.optim.clip_norm=0")
    assert config.optim.learning_rate == 1.0
    check(config, 8)


def with_codes(arg=""):
    config = get_config("llamagen", arg)
    config.data.train_dir, config.data.eval_dir = "train", "eval"
    return config


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B", "tiny"])
@pytest.mark.parametrize("recipe", ["fvq", "llamagen"])
def test_every_size_and_recipe_of_the_generator_is_valid(size, recipe):
    config = with_codes(f"size={size},recipe={recipe}")
    assert config.is_locked
    for devices in (1, 8, 64):
        check(config, devices)
    check(with_codes(f"size={size},recipe={recipe},smoke"), 8)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("B", 110_888_448),
        ("L", 342_910_976),
        ("XL", 774_699_520),
        ("XXL", 1_410_972_672),
        ("3B", 3_096_659_200),
    ],
)
def test_generators_have_the_published_numbers_of_parameters(size, parameters):
    assert count(state_of("llamagen", f"size={size}").networks["generator"].params) == parameters


def test_the_recipes_of_the_generator():
    """Batch, epochs, peak rate and how it falls, as arXiv 2509.10140 and 2406.06525 publish them; no warm-up."""
    recipes = {
        "size=L": (2048, 300.0, 8e-4, "linear", 0.05),
        "size=XL": (1024, 350.0, 4e-4, "linear", 0.05),
        "size=L,recipe=llamagen": (256, 300.0, 1e-4, "constant", None),
        "size=3B,recipe=llamagen": (256, 300.0, 1e-4, "constant", None),
    }
    for arg, (batch, epochs, rate, decay, hold) in recipes.items():
        config = get_config("llamagen", arg)
        optim = config.optim
        assert (config.batch_size, config.epochs, optim.decay) == (batch, epochs, decay)
        assert optim.learning_rate == pytest.approx(rate)
        assert (optim.warmup_steps, optim.warmup_epochs, optim.ema_decay) == (0, 0.0, 0.0)
        assert (optim.b1, optim.b2, optim.clip_norm, optim.weight_decay) == (0.9, 0.95, 1.0, 0.05)
        multiplier = Annealing(1000, 0, optim.hold, optim.decay, optim.start_factor, optim.end_factor).rate(1.0)
        assert float(multiplier(0)) == float(multiplier(49)) == 1.0
        assert float(multiplier(999)) == pytest.approx(1.0 if hold is None else 0.01)
        assert hold is None or 0.45 < float(multiplier(525)) < 0.55


def test_arguments_of_the_generator():
    base = get_config("llamagen")
    assert differences(base, get_config("llamagen", "size=L,recipe=fvq,vocab=16384,image=256")) == {}
    assert differences(base, get_config("llamagen", "vocab=262144")) == {"generator.vocab": 262144}
    assert differences(base, get_config("llamagen", "image=384")) == {"generator.grid": [24, 24]}
    assert differences(base, get_config("llamagen", "batch=512")) == {
        "batch_size": 512,
        "optim.learning_rate": pytest.approx(2e-4),
        "eval.batch_size": 512,
        "eval.every_steps": 4 * base.eval.every_steps,
        "checkpoint.every_steps": 4 * base.checkpoint.every_steps,
    }
    for arg, message in (
        ("size=M", "'size' must be one of B, L, XL, XXL, 3B, tiny, not 'M'"),
        ("recipe=own", "'recipe' must be one of fvq, llamagen, not 'own'"),
        ("image=250", "'image' must be a multiple of 16, such as 256, not 250"),
        ("vocab=0", "'vocab' must be above 0, not 0"),
    ):
        with pytest.raises(InputError, match=message):
            get_config("llamagen", arg)


def test_the_smoke_size_of_the_generator_keeps_vocabulary_and_grid():
    config = get_config("llamagen", "smoke,vocab=262144,image=384")
    assert (config.generator.vocab, config.generator.grid, config.steps) == (262144, (24, 24), 6)
    state = state_of("llamagen", "smoke")
    assert count(state.networks["generator"].params) < 3e6


def test_without_codes_a_generator_is_refused_with_what_makes_them():
    with pytest.raises(InputError, match=r"data\.train_dir is empty: .* python -m fvq_jax\.tokenize extract"):
        check(get_config("llamagen"), 8)
