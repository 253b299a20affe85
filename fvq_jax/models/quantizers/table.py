"""What quantizers that search a table have in common: the codebook, its bridge, search and look-up.

The file of a variant says what it searches for, which losses that gives, and how the gradient passes.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.models.quantizers.bridge import make_bridge, parse_bridge, rows_of_groups
from fvq_jax.ops.nearest import IMPLEMENTATIONS, PASSES, nearest_code, runs_kernel
from fvq_jax.ops.nearest_xla import BLOCK_SIZE
from fvq_jax.ops.sharded_codebook import sharded_lookup, sharded_nearest_code
from fvq_jax.runtime.fields import setting
from fvq_jax.runtime.mesh import Rules


class TableQuantizer(Quantizer):
    """Nearest-neighbour search in bridge(codebook), whose rows may be divided over a mesh.

    A variant with several codes for a latent overrides `code_shape`, `counts` and `decode`; see `levels`.
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
    init_std: float = setting(
        0.0, "Standard deviation of a fresh codebook, which is normal then; 0: uniform in +-1/k, as published."
    )

    rules: ClassVar[Rules] = ((r"codebook$", P("codebook")), (r"bridge_net/", P()))

    def setup(self) -> None:
        """Makes the codebook and the bridge."""

        def fresh(key: Array, shape: tuple[int, ...]) -> Array:
            if self.init_std > 0:
                return self.init_std * jax.random.normal(key, shape, jnp.float32)
            return jax.random.uniform(key, shape, jnp.float32, -1 / self.codebook_size, 1 / self.codebook_size)

        self.codebook = self.param("codebook", fresh, (self.codebook_size, self.code_dim))
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
        """The bridge."""
        return f"bridge {self.bridge}"

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weights of both terms."""
        return {"codebook": self.codebook_weight, "commitment": self.commitment_weight}

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

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The bridged codebook, if the bridge has classes that of one."""
        if condition is not None and not self.classes:
            raise ValueError(f"the bridge {self.bridge} has no classes: leave condition out")
        given = () if condition is None else (condition,)
        return self.codebook if self.bridge_net is None else self.bridge_net(self.codebook, *given)

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
        """Sizes and bridge; and the kind of groups, if the bridge has groups."""
        names = ["codebook_size", "code_dim", "bridge"]
        if parse_bridge(self.bridge).patch:
            names.append("bridge_groups")
        return {name: getattr(self, name) for name in names}

    @property
    def foldable(self) -> bool:
        """Whether there is a bridge."""
        return self.bridge != "none"

    def folded(self) -> "Quantizer":
        """The same without bridge: its parameter `codebook` is the `table` of this one."""
        return self.clone(bridge="none")

    def nearest(
        self, latent: Float[Array, "*n d"], table: Float[Array, "k d"], *, inner_product: bool = False
    ) -> Int[Array, "*n"]:
        """For every latent, the index of the row that is nearest or has the largest product with it; no gradient."""
        flat = latent.reshape(-1, self.code_dim)
        tokens = flat if self.mesh is None else _padded(flat, self.mesh)
        search = nearest_code if self.mesh is None else functools.partial(sharded_nearest_code, mesh=self.mesh)
        codes = search(
            tokens,
            table,
            inner_product=inner_product,
            precision=self.search_precision,
            implementation=self.search_implementation,
        )
        return codes[: len(flat)].reshape(latent.shape[:-1])

    def rows(self, table: Float[Array, "k d"], codes: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        """These rows of the table, to which gradients go."""
        flat = codes.reshape(-1)
        rows = table[flat] if self.mesh is None else sharded_lookup(_padded(flat, self.mesh), table, self.mesh)
        return rows[: len(flat)].reshape(*codes.shape, self.code_dim)


def _padded(tokens: Any, mesh: Mesh) -> Any:
    """The tokens with zeros behind them, so that the devices of the mesh divide their number."""
    return jnp.pad(tokens, ((0, -len(tokens) % mesh.size),) + ((0, 0),) * (tokens.ndim - 1))
