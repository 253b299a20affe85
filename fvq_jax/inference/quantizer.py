"""A quantizer alone, for use with another network."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from fvq_jax.inference.arguments import checked_codes
from fvq_jax.inference.location import locate
from fvq_jax.interop.quantizer_checkpoint import read_quantizer
from fvq_jax.models.quantizers.base import Quantized, Quantizer
from fvq_jax.runtime.errors import InputError


class LoadedQuantizer:
    """A function of latents: float32 [b, h, w, d] to `Quantized(vectors, codes, losses)`.

    It is compiled once for every shape, and may be differentiated, in reverse mode, and used inside other compiled
    functions. The losses are unweighted scalars by name (`codebook`, `commitment`, ...); a term whose weight is 0 may
    be left out.

    Attributes:
      quantizer: the Flax module.
      variables: its parameters, and its state if it has any, on the device.
    """

    def __init__(self, quantizer: Quantizer, variables: dict[str, Any]):
        self.quantizer = quantizer
        self.variables = jax.device_put(variables)
        self._quantize = jax.jit(quantizer.apply)
        self._decode = jax.jit(functools.partial(quantizer.apply, method="decode"), static_argnums=2)

    def __call__(self, latents: ArrayLike) -> Quantized:
        """Quantizes. InputError unless the latents are floating-point [b, h, w, d]."""
        latents, d = jnp.asarray(latents), self.quantizer.latent_dim
        if latents.ndim != 4 or latents.shape[-1] != d or not jnp.issubdtype(latents.dtype, jnp.floating):
            raise InputError(
                f"latents must be floating-point [b, h, w, {d}], not {latents.dtype} {list(latents.shape)}"
            )
        return self._quantize(self.variables, latents.astype(jnp.float32))

    def __reduce__(self) -> tuple[Any, ...]:
        return LoadedQuantizer, (self.quantizer, jax.device_get(self.variables))

    def decode(self, codes: ArrayLike, upto: int | None = None) -> Float[Array, "b h w d"]:
        """The vectors that codes stand for; `upto` limits a quantizer with levels or scales to the first ones.

        Where levels have codes of their own, code j of level l, counted from 0, is number j depth + l. InputError for
        codes and levels that do not exist, unless the codes are being traced.
        """
        if not isinstance(codes, jax.core.Tracer):
            checked_codes(self.quantizer, codes, upto)
        return self._decode(self.variables, jnp.asarray(codes), upto)


def load_quantizer(path: str | os.PathLike[str], name: str, **settings: Any) -> LoadedQuantizer:
    """Loads a quantizer from a file of its published tensors, as a function of latents.

    For instance `load_quantizer(path, name="residual", depth=4)` or `load_quantizer(path, name="multi_scale",
    scales=(1, 2, 3, 4, 6, 8))`. Sizes and bridge follow from the tensors.

    Args:
      path: a .pt, .pth, .ckpt or .safetensors file of the quantizer or of a tokenizer that has it, or another program's
        folder with such a file.
      name: the kind of quantizer, as in a config: vector, residual, multi_scale, ibq, ema or simvq.
      settings: its settings that tensors do not tell, as in a config.

    Raises:
      InputError: the file cannot be read, its tensors are not exactly those of such a quantizer (the message names
        them), or there is no such kind or setting.
    """
    return LoadedQuantizer(*read_quantizer(locate(path, "quantizer")[0], name, settings))
