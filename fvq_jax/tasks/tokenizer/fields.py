"""The settings of tokenizer training beyond the shared ones; the defaults are the paper's (arXiv 2509.10140)."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from fvq_jax.config.fields import DECAYS
from fvq_jax.data.fields import PICTURES
from fvq_jax.inference.saved import upgrade_network
from fvq_jax.models.quantizers import quantizer_fields
from fvq_jax.ops.adversarial import ADVERSARIAL_LOSSES
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import Field, Needs, prefixed
from fvq_jax.runtime.names import dotted

QUANTIZER = "tokenizer.quantizer"  # the section that holds the settings of the chosen quantizer
DISCRIMINATORS = ("patchgan", "stylegan")
_NOT_ALONE = Needs(("optim.train_only",), but=("tokenizer",))
_ADVERSARIAL = (Needs(("adversarial.weight",)), _NOT_ALONE)
_PATCHGAN = (*_ADVERSARIAL, Needs(("adversarial.discriminator",), values=("patchgan",)))
_QUANTIZER_LEARNS = Needs(("optim.train_only",), but=("decoder",))

_FIELDS: dict[str, Field] = {
    "tokenizer.ch": Field(128, "Channels of encoder and decoder at full resolution.", above=0, stays=True),
    "tokenizer.ch_mult": Field(
        (1, 1, 2, 2, 4),
        "Channels of every level, as multiples of ch; each level but the last halves the image.",
        stays=True,
    ),
    "tokenizer.num_res_blocks": Field(2, "Residual blocks of a level.", above=0, stays=True),
    "tokenizer.z_channels": Field(256, "Channels of the encoder's output and decoder's input.", above=0, stays=True),
    "tokenizer.attention_levels": Field(
        (-1,),
        "Levels with attention after each residual block, counted from 0, full resolution; -1 is the lowest.",
        stays=True,
    ),
    "tokenizer.quant_kernel": Field(
        1,
        "Side of the kernels of the convolutions in front of the quantizer and behind it.",
        choices=(1, 3),
        stays=True,
    ),
    "tokenizer.dtype": Field(
        "bfloat16",
        "Compute dtype; latents, codes, losses and parameters are float32.",
        choices=("bfloat16", "float32"),
        stays=True,
    ),
    "tokenizer.remat": Field(False, "Recompute blocks in the backward pass, to save memory."),
    "loss.reconstruction": Field(
        "l2",
        "Pixel loss: squared (l2) or absolute (l1) difference.",
        choices=("l2", "l1"),
        needs=(Needs(("loss.reconstruction_weight",)),),
    ),
    "loss.reconstruction_weight": Field(1.0, "Weight of the pixel loss."),
    "loss.perceptual_weight": Field(
        1.0, "Weight of LPIPS (VGG16); 0: no LPIPS, and the next two files are not needed."
    ),
    # An evaluation computes LPIPS with both files, whether it is part of the loss or not.
    "loss.vgg16_path": Field("", "File with torchvision's VGG16, vgg16-397923af.pth."),
    "loss.lpips_path": Field(
        "",
        "File with the heads of LPIPS v0.1, vgg.pth; empty: that of the installed package lpips.",
        needs=(Needs(("loss.vgg16_path",)),),
    ),
    "adversarial.weight": Field(
        0.5,
        "Weight of the adversarial terms of both networks; 0: no discriminator at all.",
        stays=True,
        needs=(_NOT_ALONE,),
    ),
    "adversarial.discriminator": Field(
        "patchgan",
        "Discriminator; stylegan takes images of 8, 16, ... 1024 pixels.",
        choices=DISCRIMINATORS,
        stays=True,
        needs=_ADVERSARIAL,
    ),
    "adversarial.loss": Field(
        "hinge", "Adversarial loss.", choices=tuple(ADVERSARIAL_LOSSES), stays=True, needs=_ADVERSARIAL
    ),
    "adversarial.start": Field(
        20000,
        "First step, counted from 1, at which the adversarial terms are not 0.",
        stays=True,
        needs=_ADVERSARIAL,
        late="the discriminator is never trained, and there is no adversarial loss",
    ),
    "adversarial.adaptive": Field(
        False,
        "Scale the tokenizer's adversarial term by the ratio of gradients at the decoder's last layer, as VQGAN does.",
        stays=True,
        needs=_ADVERSARIAL,
    ),
    "adversarial.ndf": Field(64, "Channels of PatchGAN.", above=0, stays=True, needs=_PATCHGAN),
    "adversarial.layers": Field(3, "Convolutions of stride 2 of PatchGAN.", above=0, stays=True, needs=_PATCHGAN),
    "optim.codebook_learning_rate": Field(
        0.0,
        "Peak rate of the quantizer's parameters, codebook and bridge; 0: they follow learning_rate.",
        stays=True,
        needs=(_QUANTIZER_LEARNS,),
    ),
    "optim.codebook_decay": Field(
        "constant",
        "How codebook_learning_rate falls after the hold.",
        choices=DECAYS,
        needs=(Needs(("optim.codebook_learning_rate",)),),
    ),
    "optim.train_only": Field(
        "",
        "Empty: train all; tokenizer: without adversarial loss; decoder: only it and the convolution before it.",
        choices=("", "tokenizer", "decoder"),
        stays=True,
    ),
    **prefixed("data", PICTURES),
    "eval.images": Field(0, "Pictures in an evaluation; 0: the whole set."),
    "eval.crops": Field(
        0, "Random crops in an evaluation, resized and placed as in training; 0: the centre of every picture."
    ),
    "eval.inception": Field("", "File with FID's InceptionV3, see README; empty: no rFID while training."),
    "log.images": Field(8, "Pictures that an evaluation shows.", above=0),
}


def fields(quantizer: str = "vector") -> dict[str, Field]:
    """All fields of a tokenizer's config with this quantizer, by full name. InputError for an unknown quantizer."""
    try:
        return {**prefixed(QUANTIZER, quantizer_fields(quantizer)), **_FIELDS}
    except ValueError as error:
        raise InputError(f"config field {QUANTIZER}.name: {error}") from None


def use_quantizer(config: ConfigDict, name: str, **settings: Any) -> None:
    """Gives a config another quantizer: its section then has the settings of that one, with these values.

    For config files; the command line can only change the values of the section that is there.
    """
    section = {field: table.default for field, table in quantizer_fields(name).items()}
    for unknown in settings.keys() - section.keys():
        raise InputError(f"the quantizer {name} has no setting {unknown}: it takes {', '.join(section)}")
    with config.unlocked():
        config.tokenizer.quantizer = ConfigDict(section | settings)


def downsampling(config: ConfigDict) -> int:
    """Pixels per token along one side."""
    return 2 ** (len(config.tokenizer.ch_mult) - 1)


def has_discriminator(config: ConfigDict) -> bool:
    """Whether there is an adversarial loss; not with train_only=tokenizer: an untrained discriminator is only noise."""
    return config.adversarial.weight > 0 and config.optim.train_only != "tokenizer"


def upgraded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that this or an older version saved, by the full names of this version."""
    flat = dotted(saved)
    if "task" in flat:
        return flat
    network = upgrade_network(saved.get("tokenizer", {}))
    flat = {name: value for name, value in flat.items() if not name.startswith("tokenizer.")}
    losses = ("codebook_weight", "commitment_weight", "entropy_weight", "entropy_temperature")
    moved = {f"{QUANTIZER}.{name}": flat.pop(f"loss.{name}") for name in losses if f"loss.{name}" in flat}
    return {"task": "tokenizer", **flat, **dotted(network, "tokenizer."), **moved}
