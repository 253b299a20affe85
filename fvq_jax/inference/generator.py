"""A trained generator for use: samples codes and pictures of classes, and says how likely given codes are.

`models.gpt_cache` decodes, `ops.sampling` draws, `generator_options` says how; `saved_generator` and `interop` read and
write the files.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from fvq_jax.inference.generator_options import (
    Sampling,
    check_numbers,
    check_tokenizer,
    checked_codes,
    checked_condition,
    checked_labels,
    guidance_of,
    knows_no_class,
)
from fvq_jax.inference.generator_programs import logits_rows, nll_bits_rows, sample_rows
from fvq_jax.inference.saved_generator import Provenance, SavedGenerator, load_generator, save_generator_folder
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.interop.gpt_checkpoint import write_gpt
from fvq_jax.interop.named_tensors import ENDINGS
from fvq_jax.models.gpt_cache import Weights, decoding_weights
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.row_parallel import BUDGET

DTYPES = ("float32", "bfloat16")
LAYOUT = "llamagen"
MAX_PER_DEVICE = 256  # images that are sampled at once: larger batches go through in parts
_LIKELIHOODS = 16  # images per device whose codes are scored at once


class Generator:
    """A transformer over codes with trained weights, and optionally the tokenizer whose codes they are.

    Everything runs on all local devices, which each hold the whole network; results are in the host's memory. Batches
    may have any size: they are padded to the next power of two of images per device, so that few programs are compiled.
    A generator may be pickled.
    """

    def __init__(self, saved: SavedGenerator, tokenizer: Tokenizer | None = None, *, dtype: DTypeLike = "float32"):
        """Takes a loaded generator; `dtype`, float32 or bfloat16, is that of weights, matrix products and cache.

        Raises:
          InputError: the tokenizer does not belong to the generator, or the dtype is another one.
        """
        name = jnp.dtype(dtype).name
        require(name in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not {name}")
        self._saved = saved
        self.net = saved.net.clone(dtype=jnp.dtype(dtype), mesh=None, remat=False, unroll=False)
        self.tokenizer = tokenizer
        if tokenizer is not None:
            check_tokenizer(saved, tokenizer)
        self._mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self._whole, self._by_rows = NamedSharding(self._mesh, P()), NamedSharding(self._mesh, P("data"))
        self._samplers: dict[tuple[bool, ...], Callable[..., Array]] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        *,
        heads: int | None = None,
        grid: tuple[int, int] | None = None,
        classes: int | None = None,
        dtype: DTypeLike = "float32",
        use_ema: bool | None = None,
    ) -> "Generator":
        """Loads LlamaGen's checkpoint, a folder that `save_pretrained` wrote, or a training workdir.

        Args:
          path: a .pt, .pth or .safetensors file, or a folder. From a workdir the newest checkpoint is taken.
          tokenizer: anything that `Tokenizer.from_pretrained` reads, or a tokenizer; without one, only codes are made.
          heads: attention heads, for a file of a size that was not published.
          grid: rows and columns of the codes of an image, for a file that does not say it.
          classes: how many classes there are, for a file of a model without class dropout that does not say it.
          dtype: float32, or bfloat16, which halves memory and its traffic on a TPU or GPU.
          use_ema: whether the moving average of the parameters is taken from a workdir; None: if there is one.

        Raises:
          InputError: there is no generator at `path`, it is incomplete, a keyword is needed or contradicts it, or the
            tokenizer does not belong to it.
        """
        saved = load_generator(path, heads=heads, grid=grid, classes=classes, use_ema=use_ema)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_pretrained(tokenizer)
        return cls(saved, tokenizer, dtype=dtype)

    def with_params(self, params: dict[str, Any]) -> "Generator":
        """This generator with other parameters of the same shapes, float32 on the host; it needs no compilation."""
        other = Generator(dataclasses.replace(self._saved, params=params), self.tokenizer, dtype=self.net.dtype)
        other._samplers = self._samplers
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Generator, dtype=jnp.dtype(self.net.dtype).name), (self._saved, self.tokenizer)

    @property
    def provenance(self) -> Provenance:
        """Which codes it was trained on, as far as that is known."""
        return self._saved.provenance

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters, float32 on the host, nested as in `models.gpt`."""
        return self._saved.params

    @property
    def has_null_class(self) -> bool:
        """Whether it knows pictures without a class, which guidance needs."""
        return knows_no_class(self.net)

    def sample_codes(
        self, labels: ArrayLike, seed: int | np.integer = 0, *, numbers: ArrayLike | None = None, **options: Any
    ) -> Int[np.ndarray, "b h w"]:
        """Draws the codes of one image for every label: a numpy array, int32 [b, h, w].

        Args:
          labels: whole numbers [b] from 0 to `net.classes`, which means "no class".
          seed: in 0..2^32-1. An image follows from the seed, its number, its label and the options alone, whatever
            else is in the batch and on how many devices it is made, except where two codes are equally likely to
            within rounding.
          numbers: the numbers of the images, [b], in 0..2^32-1; None: 0, 1, 2, ...
          options: the fields of `Sampling`: guidance=1.75, temperature=1.0, top_k=0, top_p=1.0, schedule="constant",
            interval=-1, power=1.0.

        Raises:
          InputError: a label, a number or an option that cannot be; guidance without a class for "no class".
        """
        sampling = Sampling(**options)
        labels = checked_labels(self.net, labels)
        scales = guidance_of(self.net, sampling)
        doubled = bool(scales.max() > 1)
        numbers = np.arange(len(labels)) if numbers is None else np.asarray(numbers)
        check_numbers(seed, numbers, len(labels))
        program = self._sampler(doubled, sampling.temperature == 0, sampling.top_k > 0, sampling.top_p < 1)
        settings = (
            np.uint32(seed),
            scales,
            np.float32(sampling.temperature),
            np.int32(min(sampling.top_k, self.net.vocab)),
            np.float32(sampling.top_p),
        )
        codes = self._in_parts(
            lambda *rows: program(self._weights, *settings, *rows),
            [labels, numbers.astype(np.uint32)],
            np.zeros((0, self.net.length), np.int32),
            self._most(doubled),
        )
        return codes.reshape(-1, *self.net.grid)

    def sample(
        self,
        labels: ArrayLike,
        seed: int | np.integer = 0,
        *,
        numbers: ArrayLike | None = None,
        condition: str | None = None,
        **options: Any,
    ) -> Float[np.ndarray, "b H W 3"]:
        """Draws one image for every label: a numpy array, float32 [b, H, W, 3] in [-1, 1].

        Args:
          labels, seed, numbers, options: see `sample_codes`.
          condition: for a tokenizer with a table per class, see `decode`.

        Raises:
          InputError: as `sample_codes`, and if there is no tokenizer.
        """
        self._condition(condition)
        return self.decode(self.sample_codes(labels, seed, numbers=numbers, **options), labels, condition=condition)

    def decode(
        self, codes: Int[np.ndarray, "b h w"], labels: ArrayLike, *, condition: str | None = None
    ) -> Float[np.ndarray, "b H W 3"]:
        """Codes that were sampled for `labels` as images, float32 [b, H, W, 3] in [-1, 1].

        Args:
          codes: from `sample_codes`.
          labels: whole numbers [b]; looked at only if the tokenizer has a table per class.
          condition: which of these tables: "label", those of the labels, or "null", the one of no class. It must be
            what the codes that the generator was trained on were extracted with; None takes that. A tokenizer with a
            single table has the condition "none".

        Raises:
          InputError: there is no tokenizer, or the condition does not fit.
        """
        condition, tokenizer = self._condition(condition), self.tokenizer
        assert tokenizer is not None
        if condition == "none":
            return tokenizer.decode(codes)
        if condition == "null":
            return tokenizer.decode(codes, "null")
        labels = checked_labels(self.net, labels)
        require(
            len(labels) == 0 or int(labels.max()) < self.net.classes,
            'pictures without a class have no label to be decoded with: use condition="null"',
        )
        return tokenizer.decode(codes, labels)

    def check_sampling(self, sampling: Sampling, condition: str | None = None) -> str:
        """The condition that samples will be decoded with; see `decode`.

        Raises:
          InputError: what `sample` would raise for these options.
        """
        guidance_of(self.net, sampling)
        return self._condition(condition)

    def logits(self, labels: ArrayLike, codes: ArrayLike) -> Float[np.ndarray, "b t v"]:
        """The logits of every code at every position, given the true codes before it; float32 [b, t, v].

        Args:
          labels: whole numbers [b] from 0 to `net.classes`, which means "no class".
          codes: whole numbers [b, t] or [b, h, w], from 0 to `net.vocab` - 1.

        Raises:
          InputError: another shape, type or range.
        """
        nothing = np.zeros((0, self.net.length, self.net.vocab), np.float32)
        most = _power_below(BUDGET // (16 * self.net.length * self.net.vocab), _LIKELIHOODS)
        return self._teacher_forced(self._logits, labels, codes, nothing, most)

    def nll_bits(self, labels: ArrayLike, codes: ArrayLike) -> Float[np.ndarray, "b t"]:
        """The bits that every code costs given those before it, -log2 of its probability; float32 [b, t].

        Takes and raises what `logits` does; no array with the size of the logits is made.
        """
        nothing = np.zeros((0, self.net.length), np.float32)
        return self._teacher_forced(self._nll_bits, labels, codes, nothing, _LIKELIHOODS)

    def save_pretrained(self, path: str | os.PathLike[str], layout: str | None = None) -> None:
        """Saves the generator, without its tokenizer, in float32.

        Args:
          path: a folder, or with a `layout` a file that ends in .safetensors, .pt or .pth (which need PyTorch).
          layout: None writes this package's own folder; "llamagen" writes what LlamaGen's programs load.

        Raises:
          InputError: the layout is unknown, or it cannot be written to `path`.
        """
        path = Path(path).expanduser()
        if layout is None:
            if path.suffix in ENDINGS or path.is_file():
                raise InputError(f"without a layout a folder is written, and {path} is a file: use layout={LAYOUT!r}")
            save_generator_folder(path, self._saved)
        elif layout == LAYOUT:
            write_gpt(path, self._saved.net, self._saved.params)
        else:
            raise InputError(f"unknown layout {layout!r}: use layout={LAYOUT!r} for a file, and none for a folder")

    def __repr__(self) -> str:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self._saved.params))
        rows, columns = self.net.grid
        return (
            f"Generator({count:,} parameters, {self.net.classes} classes, {rows} x {columns} codes out of "
            f"{self.net.vocab})"
        )

    # --- programs -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _weights(self) -> Weights:
        return jax.device_put(decoding_weights(self._saved.params, self.net.dtype), self._whole)

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return jax.device_put(self._saved.params, self._whole)

    def _sampler(self, doubled: bool, likeliest: bool, top_k: bool, top_p: bool) -> Callable[..., Array]:
        """The program for one kind of sampling; values such as scale, temperature and k are arguments of it."""
        kind = (doubled, likeliest, top_k and not likeliest, top_p and not likeliest)
        if kind not in self._samplers:
            self._samplers[kind] = self._spread(functools.partial(sample_rows, self.net, *kind), whole=6, rows=2)
        return self._samplers[kind]

    @functools.cached_property
    def _logits(self) -> Callable[..., Array]:
        return self._spread(functools.partial(logits_rows, self.net), whole=1, rows=2)

    @functools.cached_property
    def _nll_bits(self) -> Callable[..., Array]:
        return self._spread(functools.partial(nll_bits_rows, self.net), whole=1, rows=2)

    def _spread(self, program: Callable[..., Array], *, whole: int, rows: int) -> Callable[..., Array]:
        """A program whose last arguments are divided by rows over the devices, with no traffic between them."""
        specs = (P(),) * whole + (P("data"),) * rows
        spread = jax.shard_map(program, mesh=self._mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
        return jax.jit(spread)

    def _teacher_forced(
        self, program: Callable[..., Array], labels: ArrayLike, codes: ArrayLike, nothing: np.ndarray, most: int
    ) -> np.ndarray:
        labels = checked_labels(self.net, labels)
        rows = [labels, checked_codes(self.net, codes, len(labels))]
        return self._in_parts(functools.partial(program, self._params), rows, nothing, most)

    def _in_parts(
        self, program: Callable[..., Array], rows: list[np.ndarray], nothing: np.ndarray, most: int
    ) -> np.ndarray:
        """Runs `program` on rows of any number, at most `most` per device at once; none of them give `nothing`."""
        results, count, devices = [nothing], len(rows[0]), self._mesh.size
        for start in range(0, count, most * devices):
            parts = [array[start : start + most * devices] for array in rows]
            size = devices * 2 ** (-(-len(parts[0]) // devices) - 1).bit_length()
            padded = [
                np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)]) for part in parts
            ]
            result = program(*jax.device_put(padded, self._by_rows))
            results.append(np.asarray(result)[: len(parts[0])])
        return np.concatenate(results)

    def _condition(self, condition: str | None) -> str:
        """What codes are decoded with. InputError if it does not fit, or there is no tokenizer."""
        tables = None if self.tokenizer is None else self.tokenizer.classes
        return checked_condition(self.provenance, tables, condition)

    def _most(self, doubled: bool) -> int:
        """How many images are sampled at once on a device."""
        net = self.net
        cache = 2 * net.layers * net.width * net.length * jnp.dtype(net.dtype).itemsize
        return _power_below(BUDGET // ((1 + doubled) * (cache + 16 * net.vocab)), MAX_PER_DEVICE)


def _power_below(number: int, most: int) -> int:
    """The largest power of two that is at most both numbers; at least 1."""
    return 2 ** (max(1, min(number, most)).bit_length() - 1)
