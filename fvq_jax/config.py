"""Every field of a run's configuration with its default, and the checks that refuse a run that cannot work.

`default_config` is the only list of fields: a config file starts from it, and `validate` refuses whatever is not
in it. The defaults are the paper's recipe for 16,384 codes (arXiv 2509.10140).
"""

import difflib
import math
import re
from typing import Any

from ml_collections import ConfigDict

from fvq_jax.data.sources import SOURCES
from fvq_jax.errors import InputError
from fvq_jax.evals.image_metrics import SSIM_WINDOW
from fvq_jax.models.bridge import parse_bridge, rows_of_groups
from fvq_jax.models.discriminator_stylegan import SIZES
from fvq_jax.models.layers import GROUPS
from fvq_jax.ops.nearest import IMPLEMENTATIONS, PASSES
from fvq_jax.optim import DECAYS
from fvq_jax.sharding import mesh_shape

STYLEGAN_SIZES = SIZES[1:]  # the smallest is where it ends


def default_config() -> ConfigDict:
    """The paper's recipe; locked, so that a misspelt field raises."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128  # global, over all devices and hosts
    config.steps = 0  # length of the run: either steps or epochs, the other is 0
    config.epochs = 40.0
    config.init_from = ""  # tokenizer a new run starts from: checkpoint, saved tokenizer, workdir; all else is new
    config.on_nan = "stop"  # stop | skip (the update, and count it)
    config.mesh = ConfigDict({"data": -1, "codebook": 1})  # -1: all devices that are left

    config.tokenizer = ConfigDict()
    config.tokenizer.ch = 128
    config.tokenizer.ch_mult = (1, 1, 2, 2, 4)
    config.tokenizer.num_res_blocks = 2
    config.tokenizer.z_channels = 256
    config.tokenizer.codebook_size = 16384
    config.tokenizer.code_dim = 256
    config.tokenizer.bridge = "L/4"  # none | linear | mlp5 | SIZE/P[-dN]
    config.tokenizer.bridge_groups = "2d"  # 2d (patches of the square raster) | 1d (runs of P*P codes)
    config.tokenizer.l2_normalize = False
    config.tokenizer.search_precision = "highest"  # highest | bf16_3x | bf16_rescored | bf16, see ops/nearest.py
    config.tokenizer.search_implementation = "auto"  # auto (a kernel on TPU and GPU) | xla
    config.tokenizer.dtype = "bfloat16"  # compute; latents, codes, losses and parameters are float32
    config.tokenizer.remat = False

    config.loss = ConfigDict()
    config.loss.reconstruction = "l2"  # l2 | l1
    config.loss.reconstruction_weight = 1.0
    config.loss.codebook_weight = 1.0
    config.loss.commitment_weight = 0.25
    config.loss.entropy_weight = 0.0
    config.loss.entropy_temperature = 0.01
    config.loss.perceptual_weight = 1.0  # LPIPS; needs the two files
    config.loss.vgg16_path = ""  # torchvision's vgg16-397923af.pth
    config.loss.lpips_path = ""  # the heads, LPIPS v0.1 vgg.pth

    config.adversarial = ConfigDict()
    config.adversarial.weight = 0.5  # of both networks' adversarial terms; 0: no discriminator at all
    config.adversarial.discriminator = "patchgan"  # patchgan | stylegan (images of 8, 16, ... 1024 pixels)
    config.adversarial.loss = "hinge"  # hinge | vanilla | non_saturating
    config.adversarial.start = 20000  # both terms are 0 before this step, counted from 1
    config.adversarial.adaptive = False  # scale by the ratio of gradients at the last layer (VQGAN)
    config.adversarial.ndf = 64  # of patchgan
    config.adversarial.layers = 3

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-4
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.clip_norm = 1.0  # per network; 0: off
    config.optim.warmup_steps = 0  # either steps or epochs, the other is 0
    config.optim.warmup_epochs = 4.0
    config.optim.hold = 0.3
    config.optim.decay = "linear"  # linear | cosine | constant
    config.optim.start_factor = 0.005
    config.optim.end_factor = 0.01
    config.optim.codebook_learning_rate = 0.0  # 0: codebook and bridge follow learning_rate
    config.optim.codebook_decay = "constant"  # where they have their own rate
    config.optim.train_only = ""  # tokenizer (no adversarial loss) | decoder (and the convolution before it)
    config.optim.accumulate = 1  # micro-batches per step
    config.optim.ema_decay = 0.0  # 0: no moving average

    config.data = ConfigDict()
    config.data.source = "tfds"  # tfds | folder | array_record | photos, see docs/data.md
    config.data.tfds_name = "imagenet2012"  # NAME[/CONFIG][:VERSION] of a data set prepared as array_record
    config.data.tfds_dir = ""  # where TFDS keeps its data sets; empty: TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.train_split = "train"  # of tfds
    config.data.eval_split = "validation"
    config.data.train_dir = ""  # of folder and array_record
    config.data.eval_dir = ""
    config.data.image_size = 256
    config.data.resize_min = 256  # of the shorter side, before the random crop; 0: no resizing
    config.data.resize_max = 320
    config.data.flip = True
    config.data.num_workers = 8  # processes per host; 0: threads
    config.data.timeout = 50.0  # seconds without a batch that end the run, five times as many at the start; 0: none

    config.eval = ConfigDict()
    config.eval.every_steps = 0  # 0: only at the end
    config.eval.batch_size = 128
    config.eval.images = 0  # 0: the whole set
    config.eval.inception = ""  # FID's InceptionV3, see README; empty: no rFID while training

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 5000
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every = 0  # steps, a multiple of every_steps; 0: none beside the last ones

    config.log = ConfigDict()
    config.log.every_steps = 100
    config.log.images = 8
    return config.lock()


# Fields that may differ when a run goes on in its workdir: they change no weights, or only how long it runs.
FREE_TO_CHANGE = (
    "tokenizer.remat",
    "tokenizer.search_implementation",
    "data.num_workers",
    "data.timeout",
    "data.tfds_dir",
    "data.train_dir",
    "data.eval_dir",
)
MUST_STAY = (
    "tokenizer",
    "data",
    "adversarial",
    "seed",
    "batch_size",
    "optim.ema_decay",
    "optim.train_only",
    "optim.codebook_learning_rate",
)


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """{"optim.hold": 0.3, ...}: every field by its full name; tuples as lists, as JSON stores them."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def validate(config: ConfigDict, devices: int) -> None:
    """Refuses, with one `InputError`, a configuration that is misspelt or cannot run on that many devices."""
    _check_fields(config)
    _check_numbers(config)
    _check_schedule(config)
    _check_channels(config)
    _check_codebook(config, devices)
    _check_batch(config, devices)
    _check_images(config)
    _check_source(config.data)


def downsampling(config: ConfigDict) -> int:
    """Pixels per token along one side."""
    return 2 ** (len(config.tokenizer.ch_mult) - 1)


def has_discriminator(config: ConfigDict) -> bool:
    """Whether there is an adversarial loss; none against a tokenizer that trains alone: a random adversary is noise."""
    return config.adversarial.weight > 0 and config.optim.train_only != "tokenizer"


def check_continues(saved: dict[str, Any], config: ConfigDict) -> list[str]:
    """Compares a workdir's saved config with the one given now.

    Returns:
      Differences that are fine, as text, for the log.

    Raises:
      InputError: names every field of model, data or seed that differs; the run must not continue.
    """
    before, now = flatten(saved), flatten(config)
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    text = {name: f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in changed}
    refused = [
        text[name]
        for name in changed
        if name not in FREE_TO_CHANGE and any(name == m or name.startswith(m + ".") for m in MUST_STAY)
    ]
    if refused:
        raise InputError(
            f"this workdir holds a run with another model or data ({'; '.join(refused)}): "
            "use another workdir or the config it was started with"
        )
    return list(text.values())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _near(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, as text: what would work."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)


TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "numbers such as (1, 2)"}


def _check_fields(config: ConfigDict) -> None:
    """Same fields, same types as the defaults; an int where a float is expected is fine."""
    expected, given = flatten(default_config()), flatten(config)
    for name in sorted(given.keys() - expected.keys()):
        same = [field for field in expected if field.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        close = same or difflib.get_close_matches(name, expected, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown config field {name}{hint} (all fields: fvq_jax/config.py)")
    for name in sorted(expected.keys() - given.keys()):
        raise InputError(f"config field {name} is missing: start from fvq_jax.config.default_config()")
    for name, value in given.items():
        want = type(expected[name])
        # A bool counts as an int in Python, and not here.
        fits = isinstance(value, (int, float) if want is float else want) and isinstance(value, bool) == (want is bool)
        _require(fits, f"config field {name} must be {TYPES[want]}, not {value!r}")


POSITIVE = re.compile(
    r"(eval\.)?batch_size|tokenizer\..*|log\..*|data\.image_size|loss\.entropy_temperature|"
    r"adversarial\.(ndf|layers)|optim\.(learning_rate|accumulate)|checkpoint\.(every_steps|keep_last)"
)
CHOICES = {
    "on_nan": ("stop", "skip"),
    "tokenizer.dtype": ("bfloat16", "float32"),
    "tokenizer.bridge_groups": ("2d", "1d"),
    "tokenizer.search_precision": tuple(PASSES),
    "tokenizer.search_implementation": IMPLEMENTATIONS,
    "loss.reconstruction": ("l2", "l1"),
    "adversarial.discriminator": ("patchgan", "stylegan"),
    "adversarial.loss": ("hinge", "vanilla", "non_saturating"),
    "optim.train_only": ("", "tokenizer", "decoder"),
    "optim.decay": DECAYS,
    "optim.codebook_decay": DECAYS,
    "data.source": SOURCES,
}


def _check_numbers(config: ConfigDict) -> None:
    flat = flatten(config)
    for name, value in flat.items():
        if isinstance(value, float | int) and not isinstance(value, bool) and not name.startswith("mesh."):
            positive = POSITIVE.fullmatch(name)
            fits = math.isfinite(value) and (value > 0 if positive else value >= 0)
            least = "above 0" if positive else "0 or more"
            _require(fits, f"config field {name} must be {least} and finite, not {value}")
    for name, allowed in CHOICES.items():
        names = ", ".join(choice or "nothing" for choice in allowed)
        _require(flat[name] in allowed, f"config field {name} must be one of {names}, not {flat[name]!r}")
    for name in ("optim.hold", "optim.b1", "optim.b2", "optim.ema_decay"):
        _require(flat[name] < 1, f"config field {name} must be below 1, not {flat[name]}")
    _require(config.seed < 2**32, f"config field seed must be at most {2**32 - 1}, not {config.seed}")


def _check_schedule(config: ConfigDict) -> None:
    flat = flatten(config)
    for name in ("", "optim.warmup_"):
        steps, epochs = flat[f"{name}steps"], flat[f"{name}epochs"]
        _require(not (steps and epochs), f"{name}steps is {steps} and {name}epochs is {epochs}: set one of them to 0")
    _require(bool(config.steps or config.epochs), "the run has no length: set steps or epochs")
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every
    _require(
        keep % every == 0,
        f"checkpoint.keep_every {keep} is not a multiple of checkpoint.every_steps {every}: use {_near(keep, every)}",
    )


def _check_channels(config: ConfigDict) -> None:
    model = config.tokenizer
    _require(
        len(model.ch_mult) >= 1 and all(type(mult) is int and mult > 0 for mult in model.ch_mult),
        f"config field tokenizer.ch_mult must be positive whole {TYPES[list]}, not {model.ch_mult}",
    )
    for mult in model.ch_mult:
        _require(
            model.ch * mult % GROUPS == 0,
            f"tokenizer.ch {model.ch} x {mult} (of tokenizer.ch_mult) = {model.ch * mult} channels are not divisible "
            f"by the {GROUPS} groups of GroupNorm: set tokenizer.ch to {_near(model.ch, GROUPS)}",
        )


def _check_codebook(config: ConfigDict, devices: int) -> None:
    model, mesh = config.tokenizer, config.mesh
    try:
        spec = parse_bridge(model.bridge)
    except ValueError as error:
        raise InputError(f"tokenizer.bridge: {error}") from None
    rows = model.codebook_size
    if spec.patch:
        try:
            rows = rows_of_groups(model.codebook_size, spec.group_size, model.bridge_groups)
        except ValueError as error:
            raise InputError(
                f"tokenizer.codebook_size {model.codebook_size} does not fit tokenizer.bridge {model.bridge} with "
                f"tokenizer.bridge_groups {model.bridge_groups}: {error}; {_fitting(model, spec.patch)}"
            ) from None
    if mesh.codebook > 0:
        _check_axis(mesh.codebook, rows)
    _check_axis(mesh_shape(mesh.data, mesh.codebook, devices)[1], rows)


def _fitting(model: ConfigDict, patch: int) -> str:
    """Codebook sizes near this one that the bridge takes, as text."""
    if model.bridge_groups == "1d":
        return f"use {_near(model.codebook_size, patch**2)} codes"
    side = math.isqrt(model.codebook_size) // patch
    squares = " or ".join(str((n * patch) ** 2) for n in (side, side + 1) if n)
    return f"use {squares} codes, or any multiple of {patch**2} with tokenizer.bridge_groups=1d"


def _check_axis(size: int, rows: int) -> None:
    _require(
        rows % size == 0,
        f"mesh.codebook {size} does not divide the {rows} rows of groups of the codebook; allowed sizes: "
        f"{', '.join(str(n) for n in range(1, min(rows, 4096) + 1) if rows % n == 0)}",
    )


def _check_batch(config: ConfigDict, devices: int) -> None:
    micro = config.optim.accumulate
    unit, size = devices * micro, config.batch_size
    parts = f"{devices} devices" + (f" x {micro} micro-batches (optim.accumulate)" if micro > 1 else "")
    _require(size >= unit, f"batch_size {size} is below {parts}: the smallest that works is {unit}")
    _require(size % unit == 0, f"batch_size {size} is not divisible by {parts}: use {_near(size, unit)}")
    size, near = config.eval.batch_size, _near(config.eval.batch_size, devices)
    _require(size % devices == 0, f"eval.batch_size {size} is not divisible by {devices} devices: use {near}")


def _check_images(config: ConfigDict) -> None:
    data, size, factor = config.data, config.data.image_size, downsampling(config)
    _require(
        size % factor == 0,
        f"data.image_size {size} is not divisible by the down-sampling of {factor} (tokenizer.ch_mult has "
        f"{len(config.tokenizer.ch_mult)} levels): use {_near(size, factor)}",
    )
    layers, kind = config.adversarial.layers, config.adversarial.discriminator
    adversarial = has_discriminator(config)
    for wanted, least, reason in (
        (True, SSIM_WINDOW, "SSIM, which evaluation computes, has a window of that size"),
        (config.loss.perceptual_weight > 0, 16, "LPIPS (loss.perceptual_weight above 0) halves images four times"),
        (adversarial and kind == "patchgan", 3 * 2**layers, f"PatchGAN has adversarial.layers={layers}"),
    ):
        _require(not wanted or size >= least, f"data.image_size {size} is below {least}: {reason}")
    _require(
        not adversarial or kind != "stylegan" or size in STYLEGAN_SIZES,
        f"data.image_size {size} does not fit adversarial.discriminator=stylegan, which takes "
        f"{', '.join(map(str, STYLEGAN_SIZES))}",
    )
    _require(
        data.resize_min == 0 or size <= data.resize_min <= data.resize_max,
        f"data.resize_min {data.resize_min} and data.resize_max {data.resize_max} must satisfy "
        f"image_size {size} <= resize_min <= resize_max, or data.resize_min must be 0 (no resizing)",
    )


def _check_source(data: ConfigDict) -> None:
    """That the fields of the chosen source are set; whether its files are there is seen when it is opened."""
    if data.source in ("folder", "array_record"):
        what = "of images" if data.source == "folder" else "written by python -m fvq_jax.data.prepare"
        for name in ("train_dir", "eval_dir"):
            _require(bool(data[name]), f"data.{name} is empty: set --config.data.{name}=DIR to a folder {what}")
    if data.source == "tfds":
        for name in ("tfds_name", "train_split", "eval_split"):
            _require(bool(data[name]), f"data.{name} is empty: data.source=tfds needs it")
        for name in ("train_dir", "eval_dir"):
            _require(
                not data[name],
                f"data.{name} is set, but data.source=tfds does not read it: add --config.data.source=folder, or "
                "array_record if fvq_jax.data.prepare wrote that folder",
            )
