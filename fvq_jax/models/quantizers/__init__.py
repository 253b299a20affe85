"""Every quantizer by its name in a config: `tokenizer.quantizer.name`."""

from collections.abc import Mapping
from typing import Any

from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.models.quantizers.bsq import BSQuantizer
from fvq_jax.models.quantizers.ema import EMAQuantizer
from fvq_jax.models.quantizers.fsq import FSQuantizer
from fvq_jax.models.quantizers.ibq import IBQuantizer
from fvq_jax.models.quantizers.lfq import LFQuantizer
from fvq_jax.models.quantizers.multi_scale import MultiScaleQuantizer
from fvq_jax.models.quantizers.residual import ResidualQuantizer
from fvq_jax.models.quantizers.simvq import SimVQuantizer
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.runtime.fields import Field, settings_of

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vector": VectorQuantizer,
    "residual": ResidualQuantizer,
    "multi_scale": MultiScaleQuantizer,
    "ema": EMAQuantizer,
    "simvq": SimVQuantizer,
    "fsq": FSQuantizer,
    "lfq": LFQuantizer,
    "bsq": BSQuantizer,
    "ibq": IBQuantizer,
}


def quantizer_fields(name: str) -> dict[str, Field]:
    """The settings of a quantizer, including `name`. ValueError, which lists the known names, for another name."""
    name_field = Field(
        name, "Kind of the quantizer, see fvq_jax/models/quantizers/.", choices=tuple(QUANTIZERS), stays=True
    )
    return {"name": name_field, **settings_of(_kind(name))}


def make_quantizer(settings: Mapping[str, Any], **runtime: Any) -> Quantizer:
    """Makes the quantizer that a config's section describes (`name` and its settings); `runtime`: `dtype` and `mesh`.

    ValueError for an unknown name, TypeError for a setting that the quantizer does not have.
    """
    given = dict(settings)
    kind = _kind(given.pop("name"))
    # An int is fine where a float is expected, and a list where a tuple is.
    types = {name: type(field.default) for name, field in settings_of(kind).items()}
    values: dict[str, Any] = {
        name: types[name](value) if types.get(name) in (float, tuple) else value for name, value in given.items()
    }
    return kind(**values, **runtime)


def quantizer_settings(quantizer: Quantizer) -> dict[str, Any]:
    """The section from which `make_quantizer` makes this quantizer again."""
    name = next(name for name, kind in QUANTIZERS.items() if kind is type(quantizer))
    return {"name": name} | {field: getattr(quantizer, field) for field in settings_of(type(quantizer))}


def _kind(name: str) -> type[Quantizer]:
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}: use one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
