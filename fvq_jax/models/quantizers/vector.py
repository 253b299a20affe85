"""The vector quantizer: every latent becomes its nearest bridged code (arXiv 1711.00937; with a bridge 2509.10140)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantized, Quantizer
from fvq_jax.models.quantizers.bridge import make_bridge, parse_bridge, rows_of_groups
from fvq_jax.ops.code_usage import code_histogram
from fvq_jax.ops.entropy import entropy_loss
from fvq_jax.ops.estimators import straight_through
from fvq_jax.ops.nearest import IMPLEMENTATIONS, PASSES, nearest_code, runs_kernel
from fvq_jax.ops.nearest_xla import BLOCK_SIZE
from fvq_jax.ops.sharded_codebook import sharded_lookup, sharded_nearest_code
from fvq_jax.ops.vectors import l2_normalize
from fvq_jax.ops.vq_losses import codebook_loss, commitment_loss
from fvq_jax.runtime.fields import setting
from fvq_jax.runtime.mesh import Rules


class VectorQuantizer(Quantizer):
    """Nearest-neighbour quantization against bridge(codebook), with the straight-through estimator.

    The settings' texts say what they mean. Loss terms: `codebook`, `commitment`, and `entropy` if its weight is not 0.
    """

    codebook_size: int = setting(16384, "Number of codes k.", above=0, stays=True)
    code_dim: int = setting(256, "Dimension d of codes and latents.", above=0, stays=True)
    bridge: str = setting(
        "L/4",
        "Bridge: none, linear, mlp5, SIZE/P[-dN] or dit-SIZE/P[-dN] with SIZE one of XS, S, B, L, XL.",
        stays=True,
    )
    bridge_groups: str = setting(
        "2d",
        "Codes that a bridge takes together: 2d (P x P patches of the square raster) or 1d (runs of P*P codes).",
        choices=("2d", "1d"),
        stays=True,
    )
    l2_normalize: bool = setting(
        False, "Latents and codes are scaled to unit length before they are compared, and codes stay so.", stays=True
    )
    search_precision: str = setting(
        "highest",
        "Precision of the products of the search, see ops/nearest.py.",
        choices=tuple(PASSES),
        stays=True,
    )
    search_implementation: str = setting(
        "auto", "Program of the search: a kernel on TPU and GPU with auto, else a scan.", choices=IMPLEMENTATIONS
    )
    codebook_weight: float = setting(1.0, "Weight of the codebook loss, which pulls codes to latents.")
    commitment_weight: float = setting(0.25, "Weight of the commitment loss, which pulls latents to their codes.")
    entropy_weight: float = setting(0.0, "Weight of the entropy loss; 0 leaves it out, at no cost.")
    entropy_temperature: float = setting(0.01, "Temperature of the soft assignments of the entropy loss.", above=0)

    rules: ClassVar[Rules] = ((r"codebook$", P("codebook")), (r"bridge_net/", P()))

    def setup(self) -> None:
        """Makes the codebook, uniform in +-1/k as published, and the bridge."""

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -1 / self.codebook_size, 1 / self.codebook_size)

        self.codebook = self.param("codebook", uniform, (self.codebook_size, self.code_dim))
        self.bridge_net = make_bridge(self.bridge, self.bridge_groups, self.dtype)

    @property
    def size(self) -> int:
        """The number of codes k."""
        return self.codebook_size

    @property
    def latent_dim(self) -> int:
        """The dimension d of codes and latents."""
        return self.code_dim

    @property
    def classes(self) -> int:
        """The classes of the bridge."""
        return parse_bridge(self.bridge).classes

    @property
    def description(self) -> str:
        """The bridge, and whether codes have unit length."""
        return f"bridge {self.bridge}{', unit-length codes' if self.l2_normalize else ''}"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weights of the terms that are computed."""
        weights = {"codebook": self.codebook_weight, "commitment": self.commitment_weight}
        return weights | ({"entropy": self.entropy_weight} if self.entropy_weight > 0 else {})

    def code_shape(self, h: int, w: int) -> tuple[int, ...]:
        """One code per latent."""
        return h, w

    def check(self, axis: int = 1) -> None:
        """The bridge's groups must fit the codebook, and the axis must divide the rows of groups."""
        spec = parse_bridge(self.bridge)
        rows = self.codebook_size
        if spec.patch:
            try:
                rows = rows_of_groups(self.codebook_size, spec.group_size, self.bridge_groups)
            except ValueError as error:
                raise ValueError(
                    f"codebook_size {self.codebook_size} does not fit bridge {self.bridge} with bridge_groups "
                    f"{self.bridge_groups}: {error}; {self._fitting(spec.patch)}"
                ) from None
        if rows % axis:
            units = "rows of groups" if spec.patch else "codes"
            allowed = ", ".join(str(n) for n in range(1, min(rows, 4096) + 1) if rows % n == 0)
            raise ValueError(
                f"mesh.codebook {axis} does not divide the {rows} {units} of the codebook; allowed sizes: {allowed}"
            )

    def _fitting(self, patch: int) -> str:
        """Codebook sizes near this one that the bridge takes, as text."""
        if self.bridge_groups == "1d":
            below, above = (
                patch**2 * part for part in (self.codebook_size // patch**2, -(-self.codebook_size // patch**2))
            )
            return f"use {f'{below} or {above}' if below else above} codes"
        side = math.isqrt(self.codebook_size) // patch
        squares = " or ".join(str((n * patch) ** 2) for n in (side, side + 1) if n)
        return f"use {squares} codes, or any multiple of {patch**2} with bridge_groups=1d"

    def __call__(
        self, latent: Float[Array, "b h w d"], *, train: bool = False, key: Shaped[Array, ""] | None = None
    ) -> Quantized:
        """Quantizes, with the loss terms. The codebook is bridged once; nothing is random, and there is no state."""
        table = self.table()
        codes = self._search(latent, table)
        chosen = self._rows(table, codes)
        z = l2_normalize(latent) if self.l2_normalize else latent
        losses = {"codebook": codebook_loss(z, chosen), "commitment": commitment_loss(z, chosen)}
        if self.entropy_weight > 0:
            tokens = z.reshape(-1, self.code_dim)
            losses["entropy"] = entropy_loss(tokens, table, temperature=self.entropy_temperature, mesh=self.mesh)
        return Quantized(straight_through(z, chosen), codes, losses)

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The index of the nearest bridged code for every latent."""
        return self._search(latent, self.table())

    def decode(self, codes: Int[Array, "b h w"], upto: int | None = None) -> Float[Array, "b h w d"]:
        """The bridged codes at these indices. ValueError for an `upto`: there are no levels."""
        if upto is not None:
            raise ValueError("a vector quantizer has a single level: leave upto out")
        return self._rows(self.table(), codes)

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The bridged codebook, if the bridge has classes that of one; of unit-length rows if `l2_normalize`."""
        if condition is not None and not self.classes:
            raise ValueError(f"the bridge {self.bridge} has no classes: leave condition out")
        given = () if condition is None else (condition,)
        table = self.codebook if self.bridge_net is None else self.bridge_net(self.codebook, *given)
        return l2_normalize(table) if self.l2_normalize else table

    def counts(self, codes: Int[Array, "b h w"]) -> Int[Array, "1 k"]:
        """How often each code was chosen, as a single level."""
        return code_histogram(codes, self.codebook_size)[None]

    def uncounted_flops(self, tokens: int, platform: str) -> tuple[float, int]:
        """The flops of the search that XLA does not count, and their passes."""
        search = 2.0 * tokens * self.codebook_size * self.code_dim
        passes = 1 if platform == "cpu" else PASSES[self.search_precision]
        if runs_kernel(self.search_implementation, platform):
            return search, passes
        shards = 1 if self.mesh is None else self.mesh.shape["codebook"]
        blocks = max(self.codebook_size / shards / BLOCK_SIZE, 1)
        counted = min(2, blocks)  # the first block, outside the loop, and the loop's body once
        return search * (1 - counted / blocks), passes

    def architecture(self) -> dict[str, Any]:
        """Sizes, bridge, unit length; and the kind of groups, if the bridge has groups."""
        names = ["codebook_size", "code_dim", "bridge", "l2_normalize"]
        if parse_bridge(self.bridge).patch:
            names.append("bridge_groups")
        return {name: getattr(self, name) for name in names}

    @property
    def foldable(self) -> bool:
        """Whether there is a bridge."""
        return self.bridge != "none"

    def folded(self) -> "VectorQuantizer":
        """The same without bridge and entropy term: its parameter `codebook` is the `table` of this one."""
        return self.clone(bridge="none", entropy_weight=0.0)

    def _search(self, latent: Any, table: Any) -> Any:
        flat = latent.reshape(-1, self.code_dim)
        if self.l2_normalize:  # the table is normalised already
            flat = l2_normalize(flat)
        precision, implementation = self.search_precision, self.search_implementation
        if self.mesh is None:
            codes = nearest_code(flat, table, precision=precision, implementation=implementation)
        else:
            codes = sharded_nearest_code(flat, table, self.mesh, precision=precision, implementation=implementation)
        return codes.reshape(latent.shape[:-1])

    def _rows(self, table: Any, codes: Any) -> Any:
        flat = codes.reshape(-1)
        rows = table[flat] if self.mesh is None else sharded_lookup(flat, table, self.mesh)
        return rows.reshape(*codes.shape, self.code_dim)
