"""The multi-scale quantizer: grid by grid, finer codes for what is left of the latents (arXiv 2404.02905)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fvq_jax.models.layers import Conv
from fvq_jax.models.quantizers.bridged import BridgedQuantizer
from fvq_jax.models.quantizers.levels import LevelQuantizer
from fvq_jax.ops.resize import resize_area, resize_bicubic
from fvq_jax.runtime.fields import setting
from fvq_jax.runtime.mesh import Rules


class MultiScaleQuantizer(LevelQuantizer):
    """Multi-scale residual quantization: the levels are grids of s x s codes, one for every s in `scales`.

    At each scale, what is left of the latents is averaged over areas down to s x s, its nearest codes are looked up,
    enlarged (bicubic) and blended with a convolution of themselves, phi(h) = h/2 + conv(h)/2. That is subtracted from
    the rest. Codes are [b, sum of s^2], from coarse to fine, each grid row by row.

    Everything is float32, whatever `dtype` is. Only the codebook loss trains the convolutions: the straight-through
    estimator and the commitment loss pass them by.
    """

    scales: tuple[int, ...] = setting(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        "Sides of the grids of codes, from coarse to fine; the last one is the side of the grid of latents.",
        stays=True,
    )
    phi_count: int = setting(
        4, "Number of convolutions that refine enlarged codes; neighbouring scales share one.", above=0, stays=True
    )

    rules: ClassVar[Rules] = (*BridgedQuantizer.rules, (r"phi_\d+/", P()))

    def setup(self) -> None:
        """Makes codebook, bridge and convolutions."""
        super().setup()
        self.phi = [Conv(self.code_dim) for _ in range(self.phi_count)]

    @property
    def level_names(self) -> tuple[str, ...]:
        """scale_1, scale_2 and so on, after the sides of the scales."""
        return tuple(f"scale_{size}" for size in self.scales)

    def level_of(self, h: int, w: int) -> Int[np.ndarray, "codes"]:
        """The number of the scale of every code."""
        return np.repeat(np.arange(self.levels), np.square(self.scales))

    @property
    def description(self) -> str:
        """The bridge, and the scales."""
        return f"{super().description}, scales {' '.join(map(str, self.scales))}"

    @property
    def only_grid(self) -> tuple[int, int]:
        """The last scale."""
        return self.scales[-1], self.scales[-1]

    def code_shape(self, h: int, w: int) -> tuple[int, ...]:
        """The codes of all scales, one after the other. ValueError unless the grid of latents is the last scale."""
        side = self.scales[-1]
        if (h, w) != self.only_grid:
            raise ValueError(
                f"scales end with {side}, which takes a grid of {side} x {side} latents, not {h} x {w}: use square "
                "images, and end scales with the side of an image divided by the down-sampling"
            )
        return (sum(size**2 for size in self.scales),)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The last scale."""
        if shape != (expected := self.code_shape(*self.only_grid)):
            raise ValueError(f"codes must be [b, {expected[0]}]")
        return self.only_grid

    def check(self, axis: int = 1) -> None:
        """As for every table; scales must grow, and every convolution must have a scale."""
        super().check(axis)
        if self.classes:
            raise ValueError(f"the bridge {self.bridge} has a table for each class: scales need a single one")
        scales = self.scales
        whole = bool(scales) and all(type(size) is int and size > 0 for size in scales)
        if not whole or sorted(set(scales)) != list(scales):
            raise ValueError(f"scales must be growing positive whole numbers such as (1, 2, 4), not {scales}")
        fitting = [n for n in range(1, len(scales) + 1) if set(phi_of_scales(len(scales), n)) == set(range(n))]
        if self.phi_count not in fitting:
            raise ValueError(
                f"phi_count {self.phi_count} leaves a convolution that none of the {len(scales)} scales uses; use one "
                f"of {', '.join(map(str, fitting))}"
            )

    def architecture(self) -> dict[str, Any]:
        """Sizes, bridge, scales, convolutions; and the kind of groups, if the bridge has groups."""
        return super().architecture() | {"scales": self.scales, "phi_count": self.phi_count}

    def folded_params(self, params: Mapping[str, Any], table: Any) -> dict[str, Any]:
        """The table, and the convolutions as they are."""
        return {"codebook": table} | {name: value for name, value in params.items() if name.startswith("phi_")}

    def choose(self, latent: Float[Array, "b h w d"], table: Float[Array, "k d"]) -> Int[Array, "b codes"]:
        """The codes of each scale for what the scales before it have left over."""
        self.code_shape(*latent.shape[1:3])
        rest, codes = latent, []
        for scale, size in enumerate(self.scales):
            chosen = self.nearest(resize_area(rest, size, size), table)
            rest = rest - self._refined(scale, self.rows(table, chosen))
            codes.append(chosen.reshape(len(latent), size**2))
        return jnp.concatenate(codes, axis=1)

    def sums(
        self, table: Float[Array, "k d"], codes: Int[Array, "b codes"], upto: int
    ) -> Float[Array, "b h w {upto} d"]:
        """The sums of the vectors of the first 1, 2, ..., `upto` scales. Gradients go to table and convolutions."""
        ends = np.cumsum(np.square(self.scales[:upto]))
        rows = jnp.split(self.rows(table, codes[:, : ends[-1]]), ends[:-1], axis=1)
        sums: list[Any] = []
        for scale, vectors in enumerate(rows):
            size = self.scales[scale]
            vectors = self._refined(scale, vectors.reshape(-1, size, size, self.code_dim))
            sums.append(sums[-1] + vectors if sums else vectors)
        return jnp.stack(sums, axis=-2)

    def by_level(self, codes: Int[Array, "b codes"]) -> list[Int[Array, "b ..."]]:
        """The codes of each scale."""
        return jnp.split(codes, np.cumsum(np.square(self.scales))[:-1], axis=1)

    def _refined(self, scale: int, vectors: Any) -> Any:
        """Vectors [b, s, s, d], enlarged to the grid of latents and blended with their convolution."""
        side = self.scales[-1]
        enlarged = resize_bicubic(vectors, side, side)
        convolution = self.phi[phi_of_scales(len(self.scales), self.phi_count)[scale]]
        return 0.5 * enlarged + 0.5 * convolution(enlarged)


def phi_of_scales(scales: int, count: int) -> list[int]:
    """Which of `count` convolutions each of so many scales uses: the nearest, if both are spread over [0, 1].

    The first scale lies at 0 and the last one at 1. The convolutions lie in the middle of `count` equal parts, but four
    of them from 1/12 to 11/12, as in the published code. Ties, which occur, are decided as there: by float64.
    """
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return [int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1)))) for scale in range(scales)]
