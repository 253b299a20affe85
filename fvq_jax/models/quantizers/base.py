"""The contract of every quantizer; a variant that keeps it needs only a file of its own.

A quantizer turns a grid of latents into codes and the vectors they stand for. The rest of the package knows nothing
else about it: tasks add up its losses by name, the state is laid out by its rules, and a config's section
`tokenizer.quantizer` holds exactly its settings.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.ops.code_usage import code_histogram
from fvq_jax.runtime.mesh import Rules


@struct.dataclass
class Quantized:
    """What quantizing a grid of latents gives.

    Attributes:
      vectors: float32 [b, h, w, d], what the codes stand for, with the gradient of the quantizer's estimator.
      codes: int32 [b, *code_shape(h, w)].
      losses: scalars by name, unweighted, for instance `codebook` and `commitment`. Their weights in the total are
        the quantizer's `loss_weights`; a term whose weight is 0 may be left out.
    """

    vectors: Any
    codes: Any
    losses: dict[str, Any]


class Quantizer(nn.Module):
    """The base of all quantizers.

    A variant adds its settings as dataclass fields made by `runtime.fields.setting`: they are the section
    `config.tokenizer.quantizer`. Parameters are float32. State that is not trained (a moving average, a window of
    hits) lives in Linen collections other than `params`; it may only change inside `__call__` with `train=True`, is
    laid out by `rules`, kept in checkpoints, and never changed by an evaluation.

    Attributes:
      dtype: compute dtype of networks inside the quantizer. Latents, distances, codes and losses are float32.
      mesh: a mesh with axes `data` and `codebook`, if the rows of the table are divided; None for a single device.
    """

    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    # Whether it has parameters.
    trained: ClassVar[bool] = True

    # (pattern, layout); a pattern is matched against the path of an array after `/quantizer/`. Exactly one must match
    # each parameter and each array of state; it also matches the moments and the moving average of the parameter.
    rules: ClassVar[Rules] = ()

    @property
    def size(self) -> int:
        """How many different codes there are."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """From how many of the `size` codes each code of an image is chosen: all, unless levels have their own."""
        return self.size

    @property
    def latent_dim(self) -> int:
        """Channels d of the latents it takes and of the vectors it returns."""
        raise NotImplementedError

    @property
    def classes(self) -> int:
        """How many classes of pictures have a `table` of their own; 0 if there is a single table."""
        return 0

    @property
    def description(self) -> str:
        """What distinguishes it, apart from number and dimension of codes, in a few words for people."""
        raise NotImplementedError

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of every loss term in the total, in the order in which they are added."""
        raise NotImplementedError

    @property
    def only_grid(self) -> tuple[int, int] | None:
        """The only h and w of latents that it takes; None if it takes any."""
        return None

    def code_shape(self, h: int, w: int) -> tuple[int, ...]:
        """The shape of the codes of one image whose latents are [h, w, d]. By default there is a code per latent."""
        return h, w

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The inverse of `code_shape`: h and w of an image's latents, from the shape of its codes.

        ValueError, which says what codes [b, ...] must be, for another shape. By default there is a code per latent.
        """
        if len(shape) != 2 or 0 in shape:
            raise ValueError("codes must be [b, h, w]")
        return shape[0], shape[1]

    @property
    def level_names(self) -> tuple[str, ...]:
        """What the levels or scales are called, which are also counted apart, such as "level_1"; () if there is one."""
        return ()

    def level_of(self, h: int, w: int) -> Int[np.ndarray, "..."]:
        """The number of the level or scale that every code of an image belongs to, of the shape `code_shape(h, w)`."""
        return np.zeros(self.code_shape(h, w), int)

    def compared(self, latent: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Latents in the form in which they are compared with the vectors, for instance scaled to unit length.

        The quantization error is the distance between this and the vectors.
        """
        return latent

    def check(self, axis: int = 1) -> None:
        """Raises ValueError, saying what would work, unless the settings fit each other and mesh.codebook = `axis`."""
        raise NotImplementedError

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms.

        Args:
          latent: float32.
          train: whether state may change.
          key: for quantizers that draw random numbers, in training only.
        """
        raise NotImplementedError

    def state_of_trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state with which a run begins whose parameters come from a trained tokenizer.

        `state` is the one of a fresh start, by collection; by default it stays.
        """
        return dict(state)

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b ..."]:
        """The codes alone; no gradient."""
        raise NotImplementedError

    def decode(self, codes: Int[Array, "b ..."], upto: int | None = None) -> Float[Array, "b h w d"]:
        """The vectors that codes stand for; `upto` limits a quantizer with levels or scales to the first ones."""
        raise NotImplementedError

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"] | None:
        """The vectors that are searched, one per code; None if there is no such table.

        Args:
          condition: with `classes`, the class whose table it is, in [0, classes); None or `classes` means no class.
            The other methods use the table of no class. ValueError if there are no classes and one is given.
        """
        raise NotImplementedError

    def counts(self, codes: Int[Array, "b ..."]) -> Int[Array, "levels k"]:
        """How often each code was chosen, separately for every level or scale; by default there is one."""
        return code_histogram(codes, self.size)[None]

    def positions(self) -> Int[np.ndarray, "k"]:
        """The position of every code in its group, counted from 0, if a network takes codes in groups; else all 0.

        Codes of a position share weights, so they may all die together: their usage is also counted by position.
        """
        return np.zeros(self.size, int)

    def uncounted_flops(self, tokens: int, platform: str) -> tuple[float, float]:
        """(flops to quantize so many tokens, over all devices, that XLA does not count; passes that each takes).

        XLA does not see into a kernel, and counts the body of a loop once. `platform` is cpu, gpu or tpu; the passes
        are those of a bfloat16 matrix unit, on average.
        """
        return 0.0, 1.0

    def architecture(self) -> dict[str, Any]:
        """The settings that decide the names, shapes and meaning of its parameters and state, by name."""
        raise NotImplementedError

    def without_training_state(self) -> "Quantizer":
        """This quantizer without the settings that only training needs, and so without the state that they keep."""
        return self

    @property
    def foldable(self) -> bool:
        """Whether `folded` is simpler than this one, that is, the table that its parameters make can replace them.

        With `classes`, the table of a class replaces them for that class only.
        """
        raise NotImplementedError

    def folded(self) -> "Quantizer":
        """The quantizer for use after training. If `foldable`, its parameter `codebook` is the `table` of this one.

        A module of another class must be made with `parent=None`; else Flax would make it a submodule of this one.
        """
        raise NotImplementedError

    def folded_params(self, params: Mapping[str, Any], table: Any) -> dict[str, Any]:
        """The parameters of `folded` if `foldable`, made of the parameters and the table of this one."""
        return {"codebook": table}
