"""What quantizers with a trained codebook have in common: the codebook, and the bridge that makes the table of it."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.models.quantizers.bridge import group_positions, make_bridge, parse_bridge, rows_of_groups
from fvq_jax.models.quantizers.placement import RULES as PLACEMENT_RULES
from fvq_jax.models.quantizers.placement import Placement
from fvq_jax.models.quantizers.table import TableQuantizer
from fvq_jax.runtime.fields import Needs, setting
from fvq_jax.runtime.mesh import Rules


class BridgedQuantizer(TableQuantizer):
    """Search in bridge(codebook). Codebook and bridge are trained.

    In the published start all codes lie at zero. With `restart_after` they start on latents, see `Placement`.
    """

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
        needs=(Needs(("bridge",), but=("none", "linear", "mlp5")),),
    )
    codebook_weight: float = setting(1.0, "Weight of the codebook loss, which pulls codes to latents.")
    init_std: float = setting(
        0.0, "Standard deviation of a fresh codebook, which is normal then; 0: uniform in +-1/k, as published."
    )
    restart_after: float = setting(
        0.0,
        "Training tokens, as a multiple of the codes, after which a code that none of them chose is put onto a random "
        "latent, as all codes are at the start; 0: never, and codes start as the bridge makes them, as published.",
        stays=True,
    )

    rules: ClassVar[Rules] = ((r"codebook$", P("codebook")), (r"bridge_net/", P()), *PLACEMENT_RULES)

    def setup(self) -> None:
        """Makes the codebook and the bridge."""

        def fresh(key: Array, shape: tuple[int, ...]) -> Array:
            if self.init_std > 0:
                return self.init_std * jax.random.normal(key, shape, jnp.float32)
            return jax.random.uniform(key, shape, jnp.float32, -1 / self.codebook_size, 1 / self.codebook_size)

        self.codebook = self.param("codebook", fresh, (self.codebook_size, self.code_dim))
        divided = self.mesh is not None and self.mesh.shape["codebook"] > 1
        self.bridge_net = make_bridge(self.bridge, self.bridge_groups, self.dtype, divided)
        if self.restart_after > 0:
            self.placement = Placement(self.codebook_size, self.code_dim, self.restart_after, self.mesh)

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
        self._check_rows(rows, f"{'rows of groups' if spec.patch else 'codes'} of the codebook", axis)

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

    def bridged(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The codebook after the bridge, if the bridge has classes that of one."""
        self.refuse(condition)
        given = () if condition is None else (condition,)
        return self.codebook if self.bridge_net is None else self.bridge_net(self.codebook, *given)

    def placed(self, bridged: Float[Array, "k d"]) -> Float[Array, "k d"]:
        """The bridged codes at their places in the frame of the latents, if there is one."""
        return self.placement(bridged) if self.restart_after > 0 else bridged

    def table(self, condition: Int[Array, ""] | int | None = None) -> Float[Array, "k d"]:
        """The bridged and placed codebook, if the bridge has classes that of one."""
        return self.placed(self.bridged(condition))

    def place(
        self,
        bridged: Float[Array, "k d"],
        tokens: Float[Array, "n d"],
        codes: Int[Array, "..."],
        train: bool,
        key: Shaped[Array, ""] | None,
    ) -> None:
        """With `train` and `restart_after`, moves the places of codes after a step; see `Placement.move`."""
        if self.restart_after > 0 and train and self.is_mutable_collection("placement"):
            self.placement.move(bridged, tokens, codes.reshape(-1), key)

    def state_of_trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Codes that were trained keep their places: they start again only if they are not chosen for long."""
        if self.restart_after == 0:
            return dict(state)
        inner = state["placement"]["placement"]
        return {**state, "placement": {"placement": {**inner, "unused": jnp.zeros_like(inner["unused"])}}}

    def positions(self) -> Int[np.ndarray, "k"]:
        """The position of every code in the bridge's groups; all 0 if the bridge has none."""
        return group_positions(self.codebook_size, parse_bridge(self.bridge).group_size, self.bridge_groups)

    def architecture(self) -> dict[str, Any]:
        """Sizes and bridge; and the kind of groups, if the bridge has groups."""
        groups = {"bridge_groups": self.bridge_groups} if parse_bridge(self.bridge).patch else {}
        return super().architecture() | {"bridge": self.bridge} | groups

    @property
    def foldable(self) -> bool:
        """Whether there is a bridge, or codes have places."""
        return self.bridge != "none" or self.restart_after > 0

    def folded(self) -> "Quantizer":
        """The same without bridge and places: its parameter `codebook` is the `table` of this one."""
        return self.clone(bridge="none", restart_after=0.0)
