"""What quantizers that search a table have in common: the search and the look-up, on one device or on a mesh.

The file of a variant says what the table is made of, what it is searched for, and which losses that gives.
"""

import functools
from typing import Any

from jaxtyping import Array, Float, Int

from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.ops import entropy
from fvq_jax.ops.code_tokens import smallest_of_code
from fvq_jax.ops.estimators import ESTIMATORS, dynamic
from fvq_jax.ops.nearest import IMPLEMENTATIONS, PASSES, nearest_code, uncounted_share
from fvq_jax.ops.sharded_codebook import padded_tokens, sharded_lookup, sharded_nearest_code
from fvq_jax.runtime.fields import setting


def estimator_setting(*further: str) -> Any:
    """The setting `estimator` with the choices of `ESTIMATORS` and these."""
    return setting(
        "straight_through",
        "How the gradient passes from vectors to latents; rotation wants codes about as long as latents, see init_std.",
        choices=(*ESTIMATORS, *further),
    )


class TableQuantizer(Quantizer):
    """Nearest-neighbour search in a table, whose rows may be divided over a mesh.

    There is one code for a latent. A variant with several overrides `code_shape`, `counts`, `encode` and `decode`; see
    `levels`. A variant defines `table`, `rules` and `__call__`.
    """

    codebook_size: int = setting(16384, "Number of codes k.", above=0, stays=True)
    code_dim: int = setting(256, "Dimension d of codes and latents.", above=0, stays=True)
    search_precision: str = setting(
        "highest",
        "Precision of the products of the search, see ops/nearest.py.",
        choices=tuple(PASSES),
        stays=True,
    )
    search_implementation: str = setting(
        "auto",
        "Program of the search: auto, one for the TPU, GPU or CPU at hand; xla, a scan; tree, as auto, but on a CPU a "
        "k-d tree, for a hundred thousand codes and more of some 8 dimensions.",
        choices=IMPLEMENTATIONS,
    )
    commitment_weight: float = setting(0.25, "Weight of the commitment loss, which pulls latents to their codes.")

    @property
    def size(self) -> int:
        """The number of codes k."""
        return self.codebook_size

    @property
    def latent_dim(self) -> int:
        """The dimension d of codes and latents."""
        return self.code_dim

    def check(self, axis: int = 1) -> None:
        """The axis must divide the codes."""
        self._check_rows(self.codebook_size, "codes of the codebook", axis)

    def _check_rows(self, rows: int, units: str, axis: int) -> None:
        """ValueError unless the axis divides this number of units."""
        if rows % axis:
            allowed = ", ".join(str(n) for n in range(1, min(rows, 4096) + 1) if rows % n == 0)
            raise ValueError(f"mesh.codebook {axis} does not divide the {rows} {units}; allowed sizes: {allowed}")

    def encode(self, latent: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The index of the nearest row of the table for every latent."""
        return self.nearest(self.compared(latent), self.table())

    def decode(self, codes: Int[Array, "b h w"], upto: int | None = None) -> Float[Array, "b h w d"]:
        """The rows of the table at these indices. ValueError for an `upto`: there are no levels."""
        if upto is not None:
            raise ValueError("this quantizer has a single level: leave upto out")
        return self.rows(self.table(), codes)

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The vectors that are searched."""
        raise NotImplementedError

    def refuse(self, condition: Int[Array, ""] | int | None) -> None:
        """ValueError if a class is given and there are none."""
        if condition is not None and not self.classes:
            raise ValueError(f"{self.description} has no classes: leave condition out")

    def architecture(self) -> dict[str, Any]:
        """The sizes."""
        return {"codebook_size": self.codebook_size, "code_dim": self.code_dim}

    @property
    def streamed_products(self) -> int:
        """How often losses and their gradients multiply all latents with all codes, beside the search, in blocks."""
        return 0

    def uncounted_flops(self, tokens: int, platform: str) -> tuple[float, float]:
        """Of the search, and of the streamed products, what XLA does not count; and the mean of their passes."""
        product = 2.0 * tokens * self.choices * self.code_dim
        data, axis = (1, 1) if self.mesh is None else (self.mesh.shape["data"], self.mesh.shape["codebook"])
        local = -(-tokens // data), -(-self.choices // axis), self.code_dim
        search = product * uncounted_share(*local, self.search_precision, self.search_implementation, platform)
        blocks = max(local[1] / entropy.BLOCK_SIZE, 1)  # the index gradient's blocks are as large
        losses = self.streamed_products * product * (1 - 1 / blocks)
        if platform == "cpu" or search + losses == 0:
            return search + losses, 1.0
        passes = search * PASSES[self.search_precision] + losses * PASSES["highest"]
        return search + losses, passes / (search + losses)

    def nearest(
        self, latent: Float[Array, "*n d"], table: Float[Array, "k d"], *, inner_product: bool = False
    ) -> Int[Array, "*n"]:
        """For every latent, the index of the row that is nearest or has the largest product with it; no gradient."""
        flat = latent.reshape(-1, self.code_dim)
        tokens = flat if self.mesh is None else padded_tokens(flat, self.mesh)
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
        rows = table[flat] if self.mesh is None else sharded_lookup(padded_tokens(flat, self.mesh), table, self.mesh)
        return rows[: len(flat)].reshape(*codes.shape, self.code_dim)

    def estimated(
        self, estimator: str, z: Float[Array, "*n d"], chosen: Float[Array, "*n d"], codes: Int[Array, "*n"]
    ) -> Float[Array, "*n d"]:
        """The chosen rows, with the gradient that the estimator passes to the latents."""
        if estimator != "dynamic":
            return ESTIMATORS[estimator](z, chosen)

        def smallest(values):
            found = smallest_of_code(values.reshape(-1), codes.reshape(-1), self.codebook_size, self.mesh)
            return found.reshape(values.shape)

        return dynamic(z, chosen, smallest)
