"""Refuses a tokenizer's config that cannot run, in one line that says what would work."""

from ml_collections import ConfigDict

from fvq_jax.config.checks import near
from fvq_jax.data.fields import check_pictures
from fvq_jax.evals.pixel_metrics import SSIM_WINDOW
from fvq_jax.models.discriminators.stylegan import IMAGE_SIZES
from fvq_jax.models.layers import GROUPS, levels_from_zero
from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.mesh import mesh_shape
from fvq_jax.tasks.tokenizer.fields import QUANTIZER, downsampling, has_discriminator


def check(config: ConfigDict, devices: int) -> None:
    """Raises InputError for what the types and ranges of single fields cannot show."""
    _check_channels(config)
    _check_quantizer(config, devices)
    _check_images(config)
    require(
        not (config.eval.images and config.eval.crops),
        "eval.images and eval.crops exclude each other, both say how many pictures to score: set one of them to 0",
    )
    require(
        not config.eval.crops or config.data.source != "photos",
        "eval.crops does not go with data.source=photos, whose pictures are random crops: use eval.images",
    )
    check_pictures(config.data)


def _check_channels(config: ConfigDict) -> None:
    model = config.tokenizer
    require(
        len(model.ch_mult) >= 1 and all(type(mult) is int and mult > 0 for mult in model.ch_mult),
        f"config field tokenizer.ch_mult must be positive whole numbers such as (1, 2), not {model.ch_mult}",
    )
    levels = model.attention_levels
    require(
        all(type(level) is int for level in levels),
        f"config field tokenizer.attention_levels must be whole numbers such as (-1,), not {levels}",
    )
    try:
        levels_from_zero(tuple(levels), len(model.ch_mult))
    except ValueError as error:
        raise InputError(f"config field tokenizer.attention_levels: {error}") from None
    for mult in model.ch_mult:
        require(
            model.ch * mult % GROUPS == 0,
            f"tokenizer.ch {model.ch} x {mult} (of tokenizer.ch_mult) = {model.ch * mult} channels are not divisible "
            f"by the {GROUPS} groups of GroupNorm: set tokenizer.ch to {near(model.ch, GROUPS)}",
        )


def _check_quantizer(config: ConfigDict, devices: int) -> None:
    mesh, quantizer = config.mesh, make_quantizer(config.tokenizer.quantizer.to_dict())
    try:
        quantizer.check(max(mesh.codebook, 1))  # first the given size, so that a message names that one
        quantizer.check(mesh_shape(mesh.data, mesh.codebook, devices)[1])
    except InputError:  # from mesh_shape
        raise
    except ValueError as error:
        raise InputError(f"{QUANTIZER}: {error}") from None
    require(
        quantizer.trained or config.optim.codebook_learning_rate == 0,
        f"optim.codebook_learning_rate is the rate of a quantizer's parameters, and {quantizer.description} has none: "
        "set it to 0",
    )
    require(
        not quantizer.classes,
        f"{QUANTIZER}: {quantizer.description} has a table for each of {quantizer.classes} classes, and such a "
        "quantizer can be used but not trained, since every picture of a batch would need a table of its own: "
        "use one without classes",
    )


def _check_images(config: ConfigDict) -> None:
    size, factor = config.data.image_size, downsampling(config)
    require(
        size % factor == 0,
        f"data.image_size {size} is not divisible by the down-sampling of {factor} (tokenizer.ch_mult has "
        f"{len(config.tokenizer.ch_mult)} levels): use {near(size, factor)}",
    )
    try:
        make_quantizer(config.tokenizer.quantizer.to_dict()).code_shape(size // factor, size // factor)
    except ValueError as error:
        raise InputError(f"{QUANTIZER}: {error}") from None
    layers, kind = config.adversarial.layers, config.adversarial.discriminator
    adversarial = has_discriminator(config)
    for wanted, least, reason in (
        (True, SSIM_WINDOW, "SSIM, which evaluation computes, has a window of that size"),
        (config.loss.perceptual_weight > 0, 16, "LPIPS (loss.perceptual_weight above 0) halves images four times"),
        (adversarial and kind == "patchgan", 3 * 2**layers, f"PatchGAN has adversarial.layers={layers}"),
    ):
        require(not wanted or size >= least, f"data.image_size {size} is below {least}: {reason}")
    require(
        not adversarial or kind != "stylegan" or size in IMAGE_SIZES,
        f"data.image_size {size} does not fit adversarial.discriminator=stylegan, which takes "
        f"{', '.join(map(str, IMAGE_SIZES))}",
    )
