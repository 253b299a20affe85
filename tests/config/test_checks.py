import functools
import json
import re

import jax
import pytest
from ml_collections import ConfigDict

from configs import fvq262k
from fvq_jax.config.checks import validate
from fvq_jax.models.discriminators.patchgan import PatchGAN
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks import default_config, task_of
from fvq_jax.tasks.tokenizer.fields import downsampling, use_quantizer
from tests.helpers.tiny import tiny_config

FOLDERS = {"data.train_dir": "train", "data.eval_dir": "eval"}


def default_with(**changes):
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


def check(config, devices):
    validate(config, task_of(config), devices)


def refusal(config, devices=8):
    """The one line with which this config is refused."""
    with pytest.raises(InputError) as caught:
        check(config, devices)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_defaults_are_valid():
    check(default_with(), 8)
    check(default_with(), 1)


def test_defaults_are_locked():
    config = default_config()
    with pytest.raises(AttributeError):
        config.optim.learning_rte = 1e-4
    with pytest.raises(AttributeError):
        config.batchsize = 1


def test_the_config_of_the_tests_is_valid():
    check(tiny_config(), 8)
    check(tiny_config(), 1)


# Changes to a valid config, and what the refusal must name: field, value, what would work.
REFUSED = [
    # numbers
    ({"batch_size": 0}, ["batch_size", "above 0", "not 0"]),
    ({"tokenizer.ch": -32}, ["tokenizer.ch", "above 0", "-32"]),
    ({"tokenizer.quantizer.codebook_size": 0}, ["tokenizer.quantizer.codebook_size", "above 0"]),
    ({"tokenizer.quantizer.code_dim": 0}, ["tokenizer.quantizer.code_dim", "above 0"]),
    ({"tokenizer.z_channels": 0}, ["tokenizer.z_channels", "above 0"]),
    ({"tokenizer.num_res_blocks": 0}, ["tokenizer.num_res_blocks", "above 0"]),
    ({"tokenizer.quantizer.entropy_temperature": 0.0}, ["tokenizer.quantizer.entropy_temperature", "above 0"]),
    ({"adversarial.ndf": 0}, ["adversarial.ndf", "above 0"]),
    ({"adversarial.layers": 0}, ["adversarial.layers", "above 0"]),
    ({"optim.learning_rate": 0.0}, ["optim.learning_rate", "above 0"]),
    ({"optim.accumulate": 0}, ["optim.accumulate", "above 0"]),
    ({"data.image_size": 0}, ["data.image_size", "above 0"]),
    ({"eval.batch_size": 0}, ["eval.batch_size", "above 0"]),
    ({"checkpoint.every_steps": 0}, ["checkpoint.every_steps", "above 0"]),
    ({"checkpoint.keep_last": 0}, ["checkpoint.keep_last", "above 0"]),
    ({"log.every_steps": 0}, ["log.every_steps", "above 0"]),
    ({"log.images": 0}, ["log.images", "above 0"]),
    ({"data.num_workers": -1}, ["data.num_workers", "0 or more", "-1"]),
    ({"eval.images": -1}, ["eval.images", "0 or more"]),
    ({"eval.images": 8, "eval.crops": 8}, ["eval.images and eval.crops exclude each other"]),
    ({"tokenizer.quantizer.commitment_weight": -0.25}, ["tokenizer.quantizer.commitment_weight", "0 or more", "-0.25"]),
    ({"loss.reconstruction_weight": float("nan")}, ["loss.reconstruction_weight", "finite", "nan"]),
    ({"optim.learning_rate": float("inf")}, ["optim.learning_rate", "finite", "inf"]),
    ({"optim.clip_norm": -1.0}, ["optim.clip_norm", "0 or more"]),
    ({"seed": -1}, ["seed", "0 or more", "-1"]),
    ({"seed": 2**32}, ["seed", "at most 4294967295", "4294967296"]),
    ({"optim.hold": 1.0}, ["optim.hold", "below 1"]),
    ({"optim.b1": 1.0}, ["optim.b1", "below 1"]),
    ({"optim.b2": 1.5}, ["optim.b2", "below 1", "1.5"]),
    ({"optim.ema_decay": 1.0}, ["optim.ema_decay", "below 1"]),
    # choices
    ({"on_nan": "ignore"}, ["on_nan", "'ignore'", "stop, skip"]),
    ({"tokenizer.dtype": "float16"}, ["tokenizer.dtype", "'float16'", "bfloat16, float32"]),
    ({"tokenizer.quantizer.bridge_groups": "3d"}, ["tokenizer.quantizer.bridge_groups", "'3d'", "2d, 1d"]),
    (
        {"tokenizer.quantizer.search_precision": "f32"},
        ["search_precision", "'f32'", "highest, bf16_3x, bf16, bf16_rescored"],
    ),
    ({"tokenizer.quantizer.search_implementation": "triton"}, ["search_implementation", "'triton'", "auto, xla, tree"]),
    ({"loss.reconstruction": "huber"}, ["loss.reconstruction", "'huber'", "l2, l1"]),
    ({"adversarial.loss": "lsgan"}, ["adversarial.loss", "'lsgan'", "hinge, vanilla, non_saturating"]),
    ({"optim.decay": "step"}, ["optim.decay", "'step'", "linear, cosine, constant"]),
    ({"optim.codebook_decay": ""}, ["optim.codebook_decay", "''", "linear, cosine, constant"]),
    ({"data.source": "imagenet"}, ["data.source", "'imagenet'", "tfds, folder, array_record, photos"]),
    # length of the run
    ({"epochs": 2.0}, ["steps is 4", "epochs is 2.0", "set one of them to 0"]),
    ({"optim.warmup_epochs": 2.0}, ["optim.warmup_steps is 1", "optim.warmup_epochs is 2.0", "set one of them to 0"]),
    ({"steps": 0}, ["no length", "set steps or epochs"]),
    ({"checkpoint.keep_every": 150}, ["checkpoint.keep_every 150", "checkpoint.every_steps 100", "use 100 or 200"]),
    # encoder and decoder
    ({"tokenizer.ch": 48}, ["tokenizer.ch 48 x 1", "48 channels", "32 groups", "set tokenizer.ch to 32 or 64"]),
    ({"tokenizer.ch": 16}, ["tokenizer.ch 16", "set tokenizer.ch to 32"]),
    ({"tokenizer.attention_levels": (2,)}, ["tokenizer.attention_levels", "must be in -2..1", "(2,)"]),
    ({"tokenizer.attention_levels": (0.5,)}, ["tokenizer.attention_levels", "whole numbers", "0.5"]),
    ({"tokenizer.quant_kernel": 2}, ["tokenizer.quant_kernel", "1, 3", "2"]),
    ({"tokenizer.ch_mult": ()}, ["tokenizer.ch_mult", "positive whole numbers such as (1, 2)", "()"]),
    ({"tokenizer.ch_mult": (1, 0)}, ["tokenizer.ch_mult", "positive whole numbers", "(1, 0)"]),
    ({"tokenizer.ch_mult": (1, 1.5)}, ["tokenizer.ch_mult", "positive whole numbers", "1.5"]),
    ({"tokenizer.ch_mult": (1, "2")}, ["tokenizer.ch_mult", "positive whole numbers", "'2'"]),
    ({"tokenizer.ch_mult": (1, True)}, ["tokenizer.ch_mult", "positive whole numbers", "True"]),
    # codebook, bridge and mesh
    ({"tokenizer.quantizer.bridge": "M/4"}, ["tokenizer.quantizer: unknown bridge 'M/4'", "XS, S, B, L, XL", "L/4"]),
    (
        {"tokenizer.quantizer.bridge": "dit-XS/2-c4"},
        ["tokenizer.quantizer: bridge dit-XS/2-c4 has a table for each of 4 classes", "can be used but not trained"],
    ),
    ({"tokenizer.quantizer.bridge": ""}, ["tokenizer.quantizer: unknown bridge ''", "none, linear, mlp5"]),
    (
        {"tokenizer.quantizer.codebook_size": 60},
        [
            "codebook_size 60",
            "bridge XS/2",
            "not a square",
            "use 36 or 64 codes",
            "multiple of 4 with bridge_groups=1d",
        ],
    ),
    (
        {"tokenizer.quantizer.codebook_size": 60, "tokenizer.quantizer.bridge": "dit-XS/2"},
        ["codebook_size 60", "not a square"],
    ),
    (
        {"tokenizer.quantizer.codebook_size": 81},
        ["codebook_size 81", "9 x 9 raster", "2 x 2 patches", "use 64 or 100 codes"],
    ),
    (
        {"tokenizer.quantizer.codebook_size": 2, "tokenizer.quantizer.bridge": "S/4"},
        ["codebook_size 2", "use 16 codes"],
    ),
    (
        {"tokenizer.quantizer.codebook_size": 62, "tokenizer.quantizer.bridge_groups": "1d"},
        ["codebook_size 62", "bridge_groups 1d", "groups of 4", "use 60 or 64 codes"],
    ),
    ({"mesh.codebook": 8}, ["mesh.codebook 8", "4 rows of groups", "allowed sizes: 1, 2, 4"]),
    ({"mesh.data": 1, "mesh.codebook": -1}, ["mesh.codebook 8", "allowed sizes: 1, 2, 4"]),
    (
        {"mesh.codebook": 3, "tokenizer.quantizer.bridge_groups": "1d"},
        ["mesh.codebook 3", "allowed sizes: 1, 2, 4, 8, 16"],
    ),
    (
        {"mesh.codebook": 3, "tokenizer.quantizer.bridge": "none"},
        ["mesh.codebook 3", "allowed sizes: 1, 2, 4, 8, 16, 32, 64"],
    ),
    ({"mesh.data": 3, "mesh.codebook": 2}, ["mesh.data=3", "mesh.codebook=2", "8 devices"]),
    ({"mesh.codebook": 0}, ["mesh.codebook=0", "positive", "-1"]),
    ({"mesh.codebook": -2}, ["mesh.codebook=-2", "positive", "-1"]),
    ({"mesh.codebook": -1}, ["mesh.data=-1, mesh.codebook=-1", "at most one"]),
    # batches
    ({"batch_size": 4}, ["batch_size 4", "8 devices", "the smallest that works is 8"]),
    ({"batch_size": 20}, ["batch_size 20", "8 devices", "use 16 or 24"]),
    ({"batch_size": 8, "optim.accumulate": 2}, ["batch_size 8", "8 devices x 2 micro-batches", "that works is 16"]),
    ({"batch_size": 24, "optim.accumulate": 2}, ["batch_size 24", "optim.accumulate", "use 16 or 32"]),
    ({"eval.batch_size": 12}, ["eval.batch_size 12", "8 devices", "use 8 or 16"]),
    ({"eval.batch_size": 3}, ["eval.batch_size 3", "8 devices", "use 8"]),
    # images
    ({"data.image_size": 17}, ["data.image_size 17", "down-sampling of 2", "use 16 or 18"]),
    ({"data.image_size": 10}, ["data.image_size 10", "below 11", "SSIM"]),
    ({"data.image_size": 14, "loss.perceptual_weight": 1.0}, ["data.image_size 14", "below 16", "LPIPS"]),
    (
        {"adversarial.weight": 0.5, "adversarial.layers": 3},
        ["data.image_size 16", "below 24", "PatchGAN", "adversarial.layers=3"],
    ),
    ({"data.source": "folder", "data.eval_dir": "x"}, ["data.train_dir is empty", "--config.data.train_dir=DIR"]),
    ({"data.source": "folder", "data.train_dir": "x"}, ["data.eval_dir is empty", "--config.data.eval_dir=DIR"]),
    ({"data.source": "array_record", "data.eval_dir": "x"}, ["data.train_dir is empty", "fvq_jax.data.prepare"]),
    ({"data.source": "array_record", "data.train_dir": "x"}, ["data.eval_dir is empty", "fvq_jax.data.prepare"]),
    ({"data.source": "tfds", "data.train_dir": "x"}, ["data.train_dir is set", "--config.data.source=folder"]),
    ({"data.source": "tfds", "data.eval_dir": "x"}, ["data.eval_dir is set", "--config.data.source=folder"]),
    ({"data.source": "tfds", "data.tfds_name": ""}, ["data.tfds_name is empty", "data.source=tfds"]),
    ({"data.source": "tfds", "data.train_split": ""}, ["data.train_split is empty"]),
    ({"data.source": "tfds", "data.eval_split": ""}, ["data.eval_split is empty"]),
    ({"data.resize_min": 15, "data.resize_max": 20}, ["resize_min 15", "image_size 16", "must be 0"]),
    ({"data.resize_min": 20, "data.resize_max": 18}, ["resize_min 20", "resize_max 18"]),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[json.dumps(changes) for changes, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line_that_says_what_would(changes, named):
    message = refusal(tiny_config(**changes))
    for text in named:
        assert text in message, message


ACCEPTED = [
    {"seed": 2**32 - 1},
    {"steps": 0, "epochs": 0.5},
    {"optim.warmup_steps": 0},
    {"optim.hold": 0.0, "optim.b1": 0.0, "optim.clip_norm": 0.0},
    {"tokenizer.quantizer.codebook_size": 60, "tokenizer.quantizer.bridge_groups": "1d"},
    {"tokenizer.quantizer.codebook_size": 61, "tokenizer.quantizer.bridge": "none"},
    {"tokenizer.quantizer.codebook_size": 61, "tokenizer.quantizer.bridge": "mlp5"},
    {"tokenizer.quantizer.bridge": "XL/8-d12"},
    {"mesh.codebook": 4},
    {"mesh.data": 2, "mesh.codebook": -1},
    {"batch_size": 32, "optim.accumulate": 4},
    {"checkpoint.keep_every": 300},
    {"adversarial.weight": 0.5, "adversarial.layers": 2},  # the smallest image for two layers
    {"adversarial.layers": 5},  # there is no discriminator
    {"data.image_size": 12, "tokenizer.ch_mult": (1,)},
    {"loss.perceptual_weight": 1.0},
    {"data.resize_min": 16, "data.resize_max": 16},
    {"data.source": "folder", **FOLDERS},  # resize_min is 0: random crops of the pictures as they are
    {"data.source": "folder", "data.resize_max": 99, **FOLDERS},
    {"data.source": "array_record", **FOLDERS},
    {"data.source": "tfds", "data.tfds_name": "food101:2.0.0", "data.train_split": "train[:90%]"},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=json.dumps)
def test_what_works_is_not_refused(changes):
    check(tiny_config(**changes), 8)


def test_the_codebook_axis_divides_the_rows_of_groups():
    """262,144 codes in 8 x 8 patches are 64 rows of patches, and no axis is longer; in runs of 64 codes 4,096."""

    def of_axis(axis, groups="2d"):
        config = fvq262k.get_config()
        config.tokenizer.quantizer.bridge_groups = groups
        config.mesh.codebook = axis
        check(config, 128)

    assert fvq262k.get_config().tokenizer.quantizer.bridge == "L/8"
    of_axis(64)
    of_axis(128, groups="1d")
    message = "mesh.codebook 128 does not divide the 64 rows of groups of the codebook; allowed sizes: 1, 2, 4, 8, 16, "
    with pytest.raises(InputError, match=message + "32, 64$"):
        of_axis(128)


def test_the_discriminator_agrees_on_the_smallest_image():
    def logits(layers, size):
        model = PatchGAN(8, layers)
        image = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
        return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)

    for layers in (1, 2, 3):
        size = 3 * 2**layers
        logits(layers, size)
        with pytest.raises(ValueError, match="at least"):
            logits(layers, size - 2)


def open_config(**changes):
    """A config that nothing but `validate` checks, as a script might build one."""
    fields = tiny_config().to_dict()
    for name, value in changes.items():
        *sections, last = name.split(".")
        functools.reduce(lambda section, key: section.setdefault(key, {}), sections, fields)[last] = value
    return ConfigDict(fields)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 1.5}, ["steps must be a whole number", "1.5"]),
        ({"steps": True}, ["steps must be a whole number", "True"]),
        ({"seed": None}, ["seed must be a whole number", "None"]),
        ({"optim.learning_rate": "1e-4"}, ["optim.learning_rate must be a number", "'1e-4'"]),
        ({"optim.learning_rate": True}, ["optim.learning_rate must be a number", "True"]),
        ({"data.flip": 1}, ["data.flip must be True or False", "1"]),
        ({"tokenizer.quantizer.bridge": 4}, ["tokenizer.quantizer.bridge must be text", "4"]),
        ({"tokenizer.ch_mult": 2}, ["tokenizer.ch_mult must be numbers such as (1, 2)", "2"]),
        ({"tokenizer.ch_mult": "1,2"}, ["tokenizer.ch_mult must be numbers such as (1, 2)", "'1,2'"]),
    ],
)
def test_wrong_types_are_refused(changes, named):
    message = refusal(open_config(**changes))
    for text in named:
        assert text in message, message


def test_an_int_is_fine_where_a_float_is_expected():
    check(open_config(**{"optim.learning_rate": 1, "tokenizer.quantizer.commitment_weight": 0, "epochs": 0}), 8)
    config = tiny_config()
    config.optim.learning_rate = 1
    check(config, 8)


def test_a_list_is_fine_where_a_tuple_is_expected():
    check(open_config(**{"tokenizer.ch_mult": [1, 1]}), 8)
    config = tiny_config()
    config.tokenizer.ch_mult = [1, 1, 1]
    check(config, 8)
    assert downsampling(config) == 4


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batchsize", "batch_size"),
        ("tokenizer.brigde", "tokenizer.quantizer.bridge"),
        ("optim.learning_rte", "optim.learning_rate"),
        ("hold", "optim.hold"),
        ("data.ema_decay", "optim.ema_decay"),
    ],
)
def test_misspelt_fields_are_refused_with_the_one_that_was_meant(name, meant):
    assert re.search(rf"unknown config field {name}; did you mean {meant}\?", refusal(open_config(**{name: 1})))


def test_an_unknown_field_without_a_likeness_is_refused():
    message = refusal(open_config(**{"zzz.qqq": 1}))
    assert "unknown config field zzz.qqq" in message
    assert "did you mean" not in message


def test_a_missing_field_is_named():
    config = open_config()
    del config.optim["hold"]
    assert "optim.hold is missing" in refusal(config)


@pytest.mark.parametrize(("levels", "factor"), [((1,), 1), ((1, 1, 2), 4), ((1, 1, 2, 2, 4), 16)])
def test_downsampling(levels, factor):
    assert downsampling(tiny_config(**{"tokenizer.ch_mult": levels})) == factor


def test_a_rate_of_the_quantizer_needs_one_with_parameters():
    config = tiny_config()
    use_quantizer(config, "fsq", levels=(4, 4, 4))
    check(config, 8)
    config.optim.codebook_learning_rate = 1e-3
    assert "codebook_learning_rate is the rate of a quantizer's parameters, and FSQ, levels 4 4 4 has none" in refusal(
        config
    )
