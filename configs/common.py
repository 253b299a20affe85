"""What the config files share: reading their argument string, and the smoke size.

`--config=configs/fvq16k.py:smoke,batch=64` hands "smoke,batch=64" to `get_config`.
"""

import re
from typing import Any

from ml_collections import ConfigDict

from fvq_jax.runtime.errors import InputError

IMAGENET = 1_281_167  # pictures in its training set


def parse_arg(arg: str, **defaults: Any) -> dict[str, Any]:
    """Reads "name=value,flag". A value has the type of its default; a flag alone means True.

    A default of 0 stands for "not given".

    Raises:
      InputError: an unknown name, a value of another type, or a number below 1.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, _, text = item.partition("=")
        if name not in defaults:
            raise InputError(f"unknown config argument {name!r}: this config takes {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            values[name] = {"": True, "true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise InputError(f"config argument {name!r} must be {kind.__name__}, not {text!r}") from None
        if kind is int and values[name] < 1:
            raise InputError(f"config argument {name!r} must be above 0, not {text}")
    return values


def scale_to_batch(config: ConfigDict, batch: int, *, rate: float = 1e-4, per: int = 128) -> None:
    """Sets the global batch and what depends on it, by default from the paper's recipe, which is for 128 images.

    The learning rate is `rate` per `per` images. Discriminator, evaluations and checkpoints come after as many images
    as with the config's own batch. In steps they could come too late: with a batch of 4,096 the paper's 40 epochs end
    before step 20,000.
    """
    shrink, config.batch_size = config.batch_size / batch, batch
    config.eval.batch_size = max(config.eval.batch_size, batch)  # so that as many devices divide it
    config.optim.learning_rate = rate * batch / per
    _scale_steps(config, shrink)


def scale_to_pictures(config: ConfigDict, pictures: int) -> None:
    """For so many pictures: what comes after a number of steps comes after as many epochs as with ImageNet."""
    _scale_steps(config, pictures / IMAGENET)


def _scale_steps(config: ConfigDict, factor: float) -> None:
    fields = [("eval", "every_steps"), ("checkpoint", "every_steps")]
    if "adversarial" in config and config.adversarial.weight:  # a generator has no discriminator
        fields.append(("adversarial", "start"))
    for section, field in fields:
        if config[section][field]:
            config[section][field] = max(1, round(config[section][field] * factor))


def shrink_to_smoke(config: ConfigDict) -> None:
    """The same kind of run in seconds on a CPU: bundled photographs, tiny networks, every loss but LPIPS."""
    _shorten_to_smoke(config)
    config.optim.warmup_steps, config.optim.warmup_epochs = 2, 0.0
    config.tokenizer.ch = 32
    config.tokenizer.ch_mult = (1, 1)
    config.tokenizer.num_res_blocks = 1
    config.tokenizer.z_channels = 32
    config.tokenizer.quantizer.code_dim = 16
    config.tokenizer.quantizer.codebook_size //= 16
    config.tokenizer.quantizer.bridge = re.sub(r"(B|L|XL)/", "S/", config.tokenizer.quantizer.bridge)
    config.loss.perceptual_weight = 0.0
    if "region_window" in config.tokenizer.quantizer:
        config.tokenizer.quantizer.region_window = min(config.tokenizer.quantizer.region_window, 2)
    if config.adversarial.weight:
        config.adversarial.start = 4
        config.adversarial.ndf = 16
        config.adversarial.layers = 1
    config.data.source = "photos"
    config.data.image_size = 32
    config.data.resize_min = config.data.resize_max = 0
    config.eval.images, config.eval.crops = 64, 0


def shrink_generator_to_smoke(config: ConfigDict) -> None:
    """The same kind of training of a generator in seconds on a CPU; vocabulary and grid stay those of the codes."""
    _shorten_to_smoke(config)
    config.generator.layers, config.generator.width, config.generator.heads = 2, 64, 4
    config.eval.images = 64


def _shorten_to_smoke(config: ConfigDict) -> None:
    config.steps, config.epochs = 6, 0.0
    config.optim.learning_rate = 1e-3
    config.batch_size = config.eval.batch_size = 8
    config.data.num_workers = 0
    config.checkpoint.every_steps, config.eval.every_steps = 3, 0
    config.log.every_steps = 1
