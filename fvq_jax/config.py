"""Every field of a run's configuration with its default, and the checks that refuse a run that cannot work.

`default_config` is the only list of fields: a config file starts from it, and `validate` refuses whatever is not
in it. The defaults are the paper's recipe for 16,384 codes (arXiv 2509.10140).
"""

import math
from typing import Any

from ml_collections import ConfigDict

from fvq_jax.errors import InputError
from fvq_jax.models.bridge import parse_bridge, rows_of_groups
from fvq_jax.models.layers import GROUPS
from fvq_jax.optim import DECAYS


def default_config() -> ConfigDict:
    """The paper's recipe; locked, so that a misspelt field raises."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128  # global, over all devices and hosts
    config.steps = 0  # length of the run: either steps or epochs, the other is 0
    config.epochs = 40.0
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
    config.adversarial.loss = "hinge"  # hinge | vanilla | non_saturating
    config.adversarial.start = 20000  # both terms are 0 before this step, counted from 1
    config.adversarial.adaptive = False  # scale by the ratio of gradients at the last layer (VQGAN)
    config.adversarial.ndf = 64
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
    config.optim.accumulate = 1  # micro-batches per step
    config.optim.ema_decay = 0.0  # 0: no moving average

    config.data = ConfigDict()
    config.data.source = "folder"  # folder | photos (a few that ship with the libraries)
    config.data.train_dir = ""
    config.data.eval_dir = ""
    config.data.image_size = 256
    config.data.resize_min = 256  # of the shorter side, before the random crop
    config.data.resize_max = 320
    config.data.flip = True
    config.data.num_workers = 8  # processes per host; 0: threads

    config.eval = ConfigDict()
    config.eval.every_steps = 0  # 0: only at the end
    config.eval.batch_size = 128
    config.eval.images = 0  # 0: the whole set

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 5000
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every = 0  # steps; 0: none beside the last ones

    config.log = ConfigDict()
    config.log.every_steps = 100
    config.log.images = 8
    return config.lock()


# Fields that may differ when a run goes on in its workdir: they change no weights, or only how long it runs.
FREE_TO_CHANGE = ("data.num_workers", "data.train_dir", "data.eval_dir", "loss.vgg16_path", "loss.lpips_path")
MUST_STAY = (
    "tokenizer",
    "data",
    "adversarial",
    "seed",
    "batch_size",
    "optim.ema_decay",
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
    _check_tokenizer(config)
    _check_batch(config, devices)
    _check_data(config)


def downsampling(config: ConfigDict) -> int:
    """Pixels per token along one side."""
    return 2 ** (len(config.tokenizer.ch_mult) - 1)


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


def _check_fields(config: ConfigDict) -> None:
    """Same fields, same types as the defaults; an int where a float is expected is fine."""
    expected, given = flatten(default_config()), flatten(config)
    for name in given.keys() - expected.keys():
        known = [field for field in expected if field.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        hint = f"; did you mean {known[0]}?" if known else ""
        raise InputError(f"unknown config field {name}{hint} (all fields: fvq_jax/config.py)")
    for name in expected.keys() - given.keys():
        raise InputError(f"config field {name} is missing: start from fvq_jax.config.default_config()")
    for name, value in given.items():
        want = type(expected[name])
        fits = isinstance(value, want) and (want is bool or not isinstance(value, bool))
        if want is float and isinstance(value, int) and not isinstance(value, bool):
            fits = True
        _require(fits, f"config field {name} must be {want.__name__}, not {value!r}")


def _check_numbers(config: ConfigDict) -> None:
    flat = flatten(config)
    positive = [
        "batch_size",
        "tokenizer.ch",
        "tokenizer.num_res_blocks",
        "tokenizer.z_channels",
        "tokenizer.codebook_size",
        "tokenizer.code_dim",
        "optim.learning_rate",
        "optim.accumulate",
        "data.image_size",
        "eval.batch_size",
        "log.every_steps",
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "loss.entropy_temperature",
        "adversarial.ndf",
        "adversarial.layers",
        "log.images",
    ]
    for name in positive:
        _require(flat[name] > 0, f"config field {name} must be above 0, not {flat[name]}")
    for name, value in flat.items():
        if isinstance(value, float | int) and not isinstance(value, bool) and not name.startswith("mesh."):
            _require(
                math.isfinite(value) and value >= 0,
                f"config field {name} must not be negative or infinite: {value}",
            )
    choices = {
        "on_nan": ("stop", "skip"),
        "tokenizer.dtype": ("bfloat16", "float32"),
        "tokenizer.bridge_groups": ("2d", "1d"),
        "loss.reconstruction": ("l2", "l1"),
        "adversarial.loss": ("hinge", "vanilla", "non_saturating"),
        "optim.decay": DECAYS,
        "optim.codebook_decay": DECAYS,
        "data.source": ("folder", "photos"),
    }
    for name, allowed in choices.items():
        _require(
            flat[name] in allowed,
            f"config field {name} must be one of {', '.join(allowed)}, not {flat[name]!r}",
        )
    for a, b in (("steps", "epochs"), ("optim.warmup_steps", "optim.warmup_epochs")):
        _require(not (flat[a] and flat[b]), f"give {a} or {b}, not both ({flat[a]} and {flat[b]}): set one to 0")
    _require(bool(config.steps or config.epochs), "the run has no length: set steps or epochs")
    for name in ("optim.hold", "optim.b1", "optim.b2", "optim.ema_decay"):
        _require(flat[name] < 1, f"config field {name} must be below 1, not {flat[name]}")


def _check_tokenizer(config: ConfigDict) -> None:
    model = config.tokenizer
    _require(
        len(model.ch_mult) >= 1 and all(isinstance(m, int) and m > 0 for m in model.ch_mult),
        f"tokenizer.ch_mult must be positive whole numbers, not {model.ch_mult}",
    )
    for mult in model.ch_mult:
        channels = model.ch * mult
        _require(
            channels % GROUPS == 0,
            f"tokenizer.ch {model.ch} x {mult} = {channels} channels are not divisible by the "
            f"{GROUPS} groups of GroupNorm",
        )
    try:
        spec = parse_bridge(model.bridge)
    except ValueError as error:
        raise InputError(f"tokenizer.bridge: {error}") from None
    axis = config.mesh.codebook
    if spec.kind != "vit":
        rows = model.codebook_size
    else:
        try:
            rows = rows_of_groups(model.codebook_size, spec.group_size, model.bridge_groups)
        except ValueError as error:
            other = "1d" if model.bridge_groups == "2d" and model.codebook_size % spec.group_size == 0 else None
            hint = f"; tokenizer.bridge_groups={other} takes any multiple of {spec.group_size}" if other else ""
            raise InputError(
                f"tokenizer.codebook_size {model.codebook_size} does not fit bridge {model.bridge}: {error}{hint}"
            ) from None
    if axis > 0 and rows % axis:
        allowed = [size for size in range(1, rows + 1) if rows % size == 0 and size <= 4096]
        raise InputError(
            f"mesh.codebook {axis} does not divide the {rows} rows of groups of the codebook; "
            f"allowed sizes: {', '.join(map(str, allowed))}"
        )


def _check_batch(config: ConfigDict, devices: int) -> None:
    axis = config.mesh.codebook
    _require(
        axis == -1 or (axis > 0 and devices % axis == 0),
        f"mesh.codebook {axis} does not divide the {devices} devices",
    )
    unit = devices * config.optim.accumulate
    size = config.batch_size
    parts = f"{devices} devices" + (
        f" x {config.optim.accumulate} micro-batches" if config.optim.accumulate > 1 else ""
    )
    _require(size >= unit, f"batch_size {size} is below {parts}: the smallest that works is {unit}")
    _require(
        size % unit == 0,
        f"batch_size {size} is not divisible by {parts}: "
        f"the nearest that work are {size // unit * unit} and {-(-size // unit) * unit}",
    )
    size = config.eval.batch_size
    _require(
        size % devices == 0,
        f"eval.batch_size {size} is not divisible by {devices} devices: "
        f"the next that works is {-(-size // devices) * devices}",
    )


def _check_data(config: ConfigDict) -> None:
    data, factor = config.data, downsampling(config)
    _require(
        data.image_size % factor == 0,
        f"data.image_size {data.image_size} is not divisible by the down-sampling of {factor} (tokenizer.ch_mult has "
        f"{len(config.tokenizer.ch_mult)} levels)",
    )
    if data.source == "folder":
        _require(
            bool(data.train_dir),
            "data.train_dir is empty: set --config.data.train_dir=DIR to a folder of images",
        )
        _require(
            bool(data.eval_dir),
            "data.eval_dir is empty: set --config.data.eval_dir=DIR to a folder of images",
        )
        _require(
            data.image_size <= data.resize_min <= data.resize_max,
            f"data.resize_min {data.resize_min} and resize_max {data.resize_max} must satisfy "
            f"image_size {data.image_size} <= resize_min <= resize_max",
        )
