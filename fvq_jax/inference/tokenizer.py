"""A trained tokenizer for use: turns images into codes and back on all local devices, and loads and saves itself.

`saved` and `interop` read and write the files; `models` defines the network; `class_tables` makes the tables of a
tokenizer that has one per class.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from fvq_jax.inference.arguments import checked_codes, checked_images
from fvq_jax.inference.class_tables import NULL, ClassTables
from fvq_jax.inference.saved import SavedTokenizer, load, save_folder
from fvq_jax.interop.layouts import LAYOUTS
from fvq_jax.interop.named_tensors import ENDINGS
from fvq_jax.interop.tokenizer_checkpoint import write_checkpoint
from fvq_jax.models.layers import levels_from_zero
from fvq_jax.models.quantizers import Quantizer, quantizer_settings
from fvq_jax.models.tokenizer import TokenizerNet, quantization_error
from fvq_jax.ops.attention import SCORES
from fvq_jax.ops.pixels import to_float
from fvq_jax.runtime.cpu_devices import compiler_options
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.names import flatten
from fvq_jax.runtime.row_parallel import BUDGET

MAX_PER_DEVICE = 16  # images at once: larger batches go through in parts


class Reconstruction(NamedTuple):
    """What becomes of a batch of images.

    Attributes:
      images: float32 [b, H, W, 3] in [-1, 1].
      codes: as `Tokenizer.encode` gives them.
      error: float32 [b], the quantization error: the mean over an image's latents z of |z - q|^2.
      power: float32 [b], the mean of |z|^2.
    """

    images: Float[np.ndarray, "b H W 3"]
    codes: Int[np.ndarray, "b ..."]
    error: Float[np.ndarray, "b"]
    power: Float[np.ndarray, "b"]


class Tokenizer:
    """Encoder, quantizer and decoder with trained weights; everything in float32, results in the host's memory.

    Its bridge is folded into one table, or, if the bridge has `classes`, into a table per class when that is needed.
    Then `encode` and `decode` need the labels, and codes must be decoded with those that they were encoded with.

    Programs are compiled once for every height and width, and for few batch sizes: a batch is padded to the next power
    of two of images per device, at most `images_at_once`.
    """

    def __init__(self, saved: SavedTokenizer):
        self._saved = saved
        self.net = saved.net.clone(quantizer=saved.net.quantizer.folded())
        self.params = saved.params
        if saved.net.quantizer.foldable and not self.classes:
            folded = _folded_codebook(saved.net, saved.params) if saved.folded is None else saved.folded
            self._saved = SavedTokenizer(saved.net, saved.params, folded, saved.layout)
            quantizer = saved.net.quantizer.folded_params(saved.params.get("quantizer", {}), folded)
            self.params = {**saved.params, "quantizer": quantizer}
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self._devices = mesh.size
        self._by_rows = NamedSharding(mesh, P("data"))
        everywhere, networks, self._tables = NamedSharding(mesh, P()), dict(self.params), None
        if self.classes:
            self._tables = ClassTables(saved.net.quantizer, networks.pop("quantizer"), everywhere)
        self._on_devices = jax.device_put(networks, everywhere)
        jit = functools.partial(jax.jit, compiler_options=compiler_options(mesh))
        self._encode = jit(functools.partial(_encode, self.net))
        self._decode = jit(functools.partial(_decode, self.net), static_argnames="upto")
        # With classes, the networks run on whole batches and only search and look-up class by class.
        self._latents = jit(functools.partial(_encode, self.net, method="encode_latent"))
        self._search = jit(functools.partial(_search, self.net))
        self._look_up = jit(functools.partial(_look_up, self.net), static_argnames="upto")
        self._pixels = jit(functools.partial(_decode_vectors, self.net))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        layout: str | None = None,
        l2_norm: bool | None = None,
        scales: tuple[int, ...] | None = None,
    ) -> "Tokenizer":
        """Loads a published checkpoint, a folder that `save_pretrained` wrote, or a training workdir.

        Args:
          path: a .pt, .pth, .ckpt or .safetensors file in a published layout (docs/parity.md lists them), from whose
            tensors layout and network are inferred; the index of a .safetensors file in several parts; or a folder: a
            folder of Hugging Face with such a file, or one of this package. From a workdir the newest checkpoint is
            taken, with the moving average if there is one. Or the name of a repository of Hugging Face, "org/name" or
            "org/name@revision", which is downloaded (`pip install 'fvq_jax[hub]'`).
          layout: the name of a file's layout, where its tensors do not tell, such as "fvq_rq".
          l2_norm: whether codes have unit length, for a checkpoint that does not say so in its `args`; None takes
            what the checkpoint says, or False.
          scales: the sides of the grids of codes of a multi-scale tokenizer, if they are not the published ones.

        Raises:
          InputError: there is no tokenizer at `path`, or it is incomplete. The message names tensors that are missing,
            extra or of another shape.
        """
        return cls(load(path, layout=layout, l2_norm=l2_norm, scales=scales))

    @property
    def trained_net(self) -> TokenizerNet:
        """The network as it was trained, with its bridge; `net` has the bridge folded away."""
        return self._saved.net

    @property
    def trained_params(self) -> dict[str, Any]:
        """The parameters of `trained_net`, with the bridge and the codebook before it."""
        return self._saved.params

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return self.net.downsampling

    @property
    def classes(self) -> int:
        """How many classes of pictures have a table of their own; 0 if there is a single table."""
        return self.trained_net.quantizer.classes

    def code_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of the codes of an image of so many pixels. InputError, which says what would fit, for a size."""
        factor, only = self.downsampling, self.net.quantizer.only_grid
        sides = only or tuple(-(-max(side, 1) // factor) for side in (height, width))
        fitting = " x ".join(str(side * factor) for side in sides)
        if height % factor or width % factor or height < 1 or width < 1:
            raise InputError(
                f"images of {height} x {width} pixels do not fit the down-sampling of {factor}: height and width must "
                f"be multiples of it, for instance {fitting}"
            )
        if only not in (None, (height // factor, width // factor)):
            raise InputError(f"this tokenizer takes images of {fitting} pixels only, not of {height} x {width}: {self}")
        return self.net.quantizer.code_shape(height // factor, width // factor)

    def images_at_once(self, height: int, width: int) -> int:
        """How many images of so many pixels a device takes at once: at most `MAX_PER_DEVICE`, and fewer large ones.

        An image counts as four arrays of the widest level of the networks, and three of its attention's scores.
        """
        net, pixels = self.net, height * width
        widest = max(net.ch * mult * pixels // 4**level for level, mult in enumerate(net.ch_mult))
        lowest = min(levels_from_zero(net.attention_levels, len(net.ch_mult)), default=len(net.ch_mult) - 1)
        each = 4 * (4 * widest + 3 * min((pixels // 4**lowest) ** 2, SCORES))
        return 2 ** (min(max(BUDGET // each, 1), MAX_PER_DEVICE).bit_length() - 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Says which codes come out, in 16 hexadecimal digits: codes of one tokenizer are noise to another.

        It is the start of a SHA-256 over the weights of encoder and `quant_conv` (names, shapes, float32 values) and
        the quantizer's name, number and dimension of codes, whether they have unit length, and what else its
        architecture says but the bridge: its depth, scales or levels. The decoder does not
        count, so that codes stay valid when it is fine-tuned. Neither does the table, since the last bits of a folded
        one depend on the processor: a tokenizer that differs in nothing but its table is not told apart.
        """
        quantizer = self.trained_net.quantizer
        name, unit_length = quantizer_settings(quantizer)["name"], bool(getattr(quantizer, "l2_normalize", False))
        known = (name, quantizer.size, quantizer.latent_dim, unit_length)
        if name != "vector":  # whose fingerprints are in files since before there were others
            beside = {"codebook_size", "code_dim", "bridge", "bridge_groups"}
            known += tuple(sorted((k, v) for k, v in quantizer.architecture().items() if k not in beside))
        digest = hashlib.sha256(repr(known).encode())
        weights = flatten({part: self.params[part] for part in ("encoder", "quant_conv")})
        for path, value in sorted(weights.items()):
            digest.update(f"{path} {list(value.shape)}".encode())
            digest.update(np.ascontiguousarray(value, "<f4").tobytes())
        return digest.hexdigest()[:16]

    def table(self, condition: int | np.integer | str | None = None) -> Float[np.ndarray, "k d"] | None:
        """The table that is searched, on the host; None if the quantizer has no table.

        Args:
          condition: with `classes`, a label in [0, classes) or "null", the table of no class; otherwise None.

        Raises:
          InputError: another condition.
        """
        if self._tables is None:
            if condition is not None:
                raise InputError("this tokenizer has a single table and no classes: leave condition out")
            return self.codebook
        return np.asarray(self._tables.of(self._tables.number(condition)))

    @functools.cached_property
    def codebook(self) -> Float[np.ndarray, "k d"] | None:
        """The table that is searched: the bridge is applied, and rows have unit length if the codes do.

        None if the quantizer has no table. InputError if every class has its own: see `table`.
        """
        if self._tables is not None:
            raise InputError(
                f"this tokenizer has a table for each of {self.classes} classes and no single one: "
                f'use table(label) or table("{NULL}")'
            )
        table: Any = jax.jit(functools.partial(self.net.apply, method="table"))({"params": self.params})
        return None if table is None else np.asarray(table)

    def encode(
        self,
        images: ArrayLike,
        labels: ArrayLike | str | None = None,
        *,
        value_range: tuple[float | int, float | int] | None = None,
    ) -> Int[np.ndarray, "b ..."]:
        """Images to codes: a numpy array, int32 [b, h, w], in [0, k).

        A quantizer with levels has more codes per image: residual [b, h, w, depth], multi-scale [b, codes].

        Args:
          images: [b, H, W, 3], uint8, or floating-point in `value_range`; any b, H and W multiples of `downsampling`.
          value_range: black and white of floating-point images, such as (0, 1). None stands for (-1, 1), with a
            warning if no value of the images is below 0, since pictures in [0, 1] are often meant then.
          labels: with `classes`, the classes of the images, whole numbers [b] in [0, classes), or "null", which takes
            the table of no class for all of them; otherwise None.

        Raises:
          InputError: another shape, type or range; labels are missing, or not needed; the quantizer takes images of
            another size only.
        """
        images = checked_images(images, value_range)
        grid = self._grid_of(images)
        numbers = self._numbers(labels, len(images))
        nothing = np.zeros((0, *self.net.quantizer.code_shape(*grid)), np.int32)
        if numbers is None:
            return self._in_parts(self._encode, images, nothing, at_once=self.images_at_once(*images.shape[1:3]))
        return self._by_class(self._search, self._all_latents(images, grid), numbers, nothing)

    def reconstruct(
        self,
        images: ArrayLike,
        labels: ArrayLike | str | None = None,
        *,
        value_range: tuple[float | int, float | int] | None = None,
    ) -> Reconstruction:
        """Encodes and decodes, and says how far the latents are from the vectors that their codes stand for.

        Arguments and errors are those of `encode`. What comes out is in [-1, 1], whatever `value_range` is.
        """
        images = checked_images(images, value_range)
        grid = self._grid_of(images)
        numbers, quantizer = self._numbers(labels, len(images)), self.net.quantizer
        latents, codes = self._all_latents(images, grid), np.zeros((0, *quantizer.code_shape(*grid)), np.int32)
        vectors, params = np.zeros((0, *grid, quantizer.latent_dim), np.float32), self._on_devices.get("quantizer", {})
        if numbers is None:
            codes = self._in_parts(self._search, latents, codes, params)
            vectors = self._in_parts(self._look_up, codes, vectors, params)
        else:
            codes = self._by_class(self._search, latents, numbers, codes)
            vectors = self._by_class(self._look_up, codes, numbers, vectors)
        nothing, at_once = np.zeros((0, *images.shape[1:]), np.float32), self.images_at_once(*images.shape[1:3])
        pixels = self._in_parts(self._pixels, vectors, nothing, at_once=at_once)
        error, power = quantization_error(quantizer.compared(jnp.asarray(latents)), jnp.asarray(vectors))
        return Reconstruction(pixels, codes, np.asarray(error), np.asarray(power))

    def _grid_of(self, images: np.ndarray) -> tuple[int, int]:
        """Rows and columns of latents of images [b, H, W, 3]. InputError for a size that does not fit."""
        height, width = images.shape[1:3]
        self.code_shape(height, width)
        return height // self.downsampling, width // self.downsampling

    def _all_latents(self, images: np.ndarray, grid: tuple[int, int]) -> Float[np.ndarray, "b h w d"]:
        nothing = np.zeros((0, *grid, self.net.quantizer.latent_dim), np.float32)
        return self._in_parts(self._latents, images, nothing, at_once=self.images_at_once(*images.shape[1:3]))

    def decode(
        self, codes: ArrayLike, labels: ArrayLike | str | None = None, *, upto: int | None = None
    ) -> Float[np.ndarray, "b H W 3"]:
        """Codes to images: a numpy array, float32 [b, H, W, 3], in [-1, 1].

        Args:
          codes: whole numbers in [0, k), of a shape that `encode` gives.
          labels: as for `encode`, and the same.
          upto: decode only so many of the levels of a residual quantizer, or of the scales of a multi-scale one.

        Raises:
          InputError: another shape, type or range; labels are missing, or not needed.
        """
        quantizer = self.net.quantizer
        codes, grid = checked_codes(quantizer, codes, upto)
        height, width = (side * self.downsampling for side in grid)
        nothing = np.zeros((0, height, width, 3), np.float32)
        upto = upto if quantizer.level_names else None
        numbers, at_once = self._numbers(labels, len(codes)), self.images_at_once(height, width)
        if numbers is None:
            return self._in_parts(functools.partial(self._decode, upto=upto), codes, nothing, at_once=at_once)
        vectors = np.zeros((0, *grid, quantizer.latent_dim), np.float32)
        vectors = self._by_class(functools.partial(self._look_up, upto=upto), codes, numbers, vectors)
        return self._in_parts(self._pixels, vectors, nothing, at_once=at_once)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        layout: str | None = None,
        *,
        condition: int | np.integer | str | None = None,
    ) -> None:
        """Saves the tokenizer.

        Args:
          path: a folder, or with a `layout` a file that ends in .safetensors, or in .pt, .pth or .ckpt (which need
            PyTorch).
          layout: None writes this package's own folder (weights with the bridge folded, config.json, and the bridge in
            a file of its own). "llamagen" writes what LlamaGen's VQModel loads, with the bridge folded; "fvq" writes
            the published layout of FVQ, with the bridge and the codebook before it; docs/parity.md lists the others. A
            .safetensors file holds the bare tensors, a .pt file of these two `{"model": tensors, "args":
            {"codebook_l2_norm": ...}}`, as LlamaGen's programs expect:
            `vq_model.load_state_dict(torch.load(path)["model"])`. That VQModel must have the same sizes and the
            same `codebook_l2_norm`, whose default there is True.
          condition: with `classes`, the one whose table a layout without bridge holds: a label or "null". The other
            forms hold the bridge, and so the tables of all classes.

        Raises:
          InputError: the layout cannot hold this tokenizer, or it cannot be written to `path`.
        """
        if layout is not None and layout not in LAYOUTS:
            raise InputError(f"unknown layout {layout!r}: {_layouts()}")
        single = layout is not None and not LAYOUTS[layout].bridged
        if condition is not None and not (self.classes and single):
            raise InputError(
                'condition is for a layout without bridge, such as "llamagen", of a tokenizer with classes: '
                "leave it out"
            )
        if single and self.classes and condition is None:
            raise InputError(
                f'the layout "{layout}" holds a single table, and this tokenizer has one for each of {self.classes} '
                f'classes: give condition, a label in 0..{self.classes - 1}, or "{NULL}" for no class'
            )
        if "\0" in str(path):
            raise InputError(f"there can be no file at {str(path)!r}: it has a null byte")
        path = Path(path).expanduser()
        if layout is None:
            if path.suffix in ENDINGS or path.is_file():
                raise InputError(f"without a layout a folder is written, and {path} is a file: {_layouts()}")
            save_folder(path, self._saved)
        elif single:
            table = {"quantizer": {"codebook": self.table(condition)}} if self.classes else {}
            write_checkpoint(path, layout, self.net, {**self.params, **table})
        else:
            write_checkpoint(path, layout, self.trained_net, self.trained_params)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._saved,)

    def __repr__(self) -> str:
        return describe(self.trained_net.quantizer, self.downsampling)

    def _numbers(self, labels: ArrayLike | str | None, rows: int) -> Int[np.ndarray, "b"] | None:
        """The class of every row; None for a tokenizer without classes. InputError for labels that do not fit it."""
        if self._tables is not None:
            return self._tables.numbers(labels, rows)
        if labels is not None:
            raise InputError("this tokenizer has a single table and no classes: leave labels out")
        return None

    def _by_class(
        self, program: Callable[[Any, Any], Any], rows: np.ndarray, numbers: np.ndarray, nothing: np.ndarray
    ) -> np.ndarray:
        """Runs `program` with the table of each class that occurs on the rows that belong to it."""
        assert self._tables is not None
        results = np.empty((len(rows), *nothing.shape[1:]), nothing.dtype)
        for chosen, table in self._tables.by_class(numbers):
            results[chosen] = self._in_parts(program, rows[chosen], nothing, {"codebook": table})
        return results

    def _in_parts(
        self,
        program: Callable[[Any, Any], Any],
        rows: np.ndarray,
        nothing: np.ndarray,
        params: Any = None,
        *,
        at_once: int = MAX_PER_DEVICE,
    ) -> np.ndarray:
        """Runs `program` on a batch of any size, in parts; an empty batch gives `nothing`.

        `at_once` is how many rows a device takes.
        `params` are its parameters, on the devices; None takes those of the networks.
        """
        params = self._on_devices if params is None else params
        results, most = [nothing], at_once * self._devices
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            per_device = -(-len(part) // self._devices)
            size = self._devices * 2 ** (per_device - 1).bit_length()
            padded = np.zeros((size, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            result = program(params, jax.device_put(padded, self._by_rows))
            results.append(np.asarray(result)[: len(part)])
        return np.concatenate(results)


def describe(quantizer: Quantizer, downsampling: int) -> str:
    """A tokenizer in one line."""
    codes = f"{quantizer.size} x {quantizer.latent_dim} codes"
    return f"Tokenizer({codes}, {quantizer.description}, down-sampling {downsampling})"


# Programs on a batch. `params` are those of the network, or of its quantizer in `_search` and `_look_up`.


def _encode(net: TokenizerNet, params: dict[str, Any], images: Array, method: str = "encode") -> Any:
    images = to_float(images) if images.dtype == jnp.uint8 else images
    return net.apply({"params": params}, images, method=method)


def _decode(net: TokenizerNet, params: dict[str, Any], codes: Array, upto: int | None = None) -> Array:
    images: Any = net.apply({"params": params}, codes, upto, method="decode")
    return jnp.clip(images, -1, 1)


def _decode_vectors(net: TokenizerNet, params: dict[str, Any], vectors: Array) -> Array:
    images: Any = net.apply({"params": params}, vectors, method="decode_vectors")
    return jnp.clip(images, -1, 1)


def _search(net: TokenizerNet, params: dict[str, Any], latents: Array) -> Any:
    return net.quantizer.apply({"params": params}, latents, method="encode")


def _look_up(net: TokenizerNet, params: dict[str, Any], codes: Array, upto: int | None = None) -> Any:
    return net.quantizer.apply({"params": params}, codes, upto, method="decode")


def _folded_codebook(net: TokenizerNet, params: dict[str, Any]) -> np.ndarray:
    """The table [k, d] that replaces codebook and bridge."""
    table = jax.jit(functools.partial(net.apply, method="table"))
    return np.asarray(table({"params": params}))


def _layouts() -> str:
    return f"use layout={' or layout='.join(repr(name) for name in LAYOUTS)} for a file, and no layout for a folder"
