"""Where codes start, and start again: on latents, in a frame that follows them. State of quantizers with a bridge."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from fvq_jax.ops.code_tokens import code_sums, random_tokens
from fvq_jax.runtime.mesh import Rules

NEVER = -1  # in `unused`: the code has not been put onto a latent yet
FLOOR = 1e-5  # the least variance of the frame along any direction, as a part of the largest
RULES: Rules = (
    (r"placement/(offset|unused)$", P("codebook")),
    (r"placement/(next_row|steps|mean|covariance|root)$", P()),
)


class Placement(nn.Module):
    """Makes the table of the bridge's results: mean + (bridged + offset) root(covariance).

    Mean and covariance are those of the latents, averaged over the last tenth, about, of all training steps, so that
    codes move and spread as the latents do. The offset is where a code was put relative to them: in the first steps
    every code is put onto a latent of its own, and onto another one whenever it has not been chosen for a long time.

    The time is counted in tokens per code, so that one value suits all batches and codebooks: a code that is as
    frequent as the average is missed for X of them with probability exp(-X). Rows take turns, and all have had one in
    half that time: codes that start together would only know the pictures of a few batches.

    State: `offset` [k, d] and `unused` [k], the steps since a code was last chosen, are divided by rows; `mean` [1, d],
    `covariance` and its root [d, d], `steps`, and `next_row`, where the rows begin whose turn it is, are on all
    devices. Only `move` changes it.

    Attributes:
      codes, dim: k and d.
      patience: tokens per code after which a code that none of them chose is put elsewhere.
      mesh: as for the quantizer.
    """

    codes: int
    dim: int
    patience: float
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Makes the state; without it the table would be the bridge's results."""
        start = {
            "offset": jnp.zeros((self.codes, self.dim)),
            "unused": jnp.full(self.codes, NEVER, jnp.int32),
            "next_row": jnp.zeros((), jnp.int32),
            "steps": jnp.zeros((), jnp.int32),
            "mean": jnp.zeros((1, self.dim)),
            "covariance": jnp.eye(self.dim),
            "root": jnp.eye(self.dim),
        }
        self.state = {
            name: self.variable("placement", name, lambda value=value: value) for name, value in start.items()
        }

    def __call__(self, bridged: Float[Array, "k d"]) -> Float[Array, "k d"]:
        """The table."""
        offset, mean, root = (self.state[name].value for name in ("offset", "mean", "root"))
        return mean + _dot(bridged + offset, root)

    def move(
        self,
        bridged: Float[Array, "k d"],
        tokens: Float[Array, "n d"],
        codes: Int[Array, "m"],
        key: Shaped[Array, ""] | None,
    ) -> None:
        """Takes a training step: the frame follows the tokens, and codes that are due are put onto random ones.

        Args:
          bridged: the bridge's results of this step.
          tokens: what codes are searched for.
          codes: all that were chosen, on all levels.
          key: for choosing tokens. ValueError if it is missing.
        """
        if key is None:
            raise ValueError("training with restart_after > 0 draws random latents: give a key")
        bridged, tokens = jax.lax.stop_gradient((bridged, tokens))
        steps, unused, start = (self.state[name].value for name in ("steps", "unused", "next_row"))
        before = self(bridged)
        back = self._follow(tokens)

        def offset_of(places):
            return _dot(places - self.state["mean"].value, back) - bridged

        # Codes that were trained before this run stay where they are when the first frame appears.
        trained = ((steps == 0) & (unused != NEVER))[:, None]
        offset = jnp.where(trained, offset_of(before), self.state["offset"].value)
        fresh = offset_of(random_tokens(tokens, key, self.codes, self.mesh, start=start))
        due = self._due(codes, len(tokens))
        self.state["offset"].value = jnp.where(due[:, None], fresh, offset)

    def _follow(self, tokens):
        """Moves the frame; returns the inverse of its new root."""
        steps = self.state["steps"].value
        mean = jnp.mean(tokens, axis=0, keepdims=True)
        off = tokens - mean
        share = 9 / (steps + 9)  # the first batch counts alone
        for name, found in (("mean", mean), ("covariance", _dot(off.T, off) / len(tokens))):
            self.state[name].value += share * (found - self.state[name].value)
        self.state["steps"].value = steps + 1
        variances, axes = jnp.linalg.eigh(self.state["covariance"].value)
        deviations = jnp.sqrt(jnp.maximum(variances, FLOOR * variances[-1]))[None]
        self.state["root"].value = _dot(axes * deviations, axes.T)
        return _dot(axes / deviations, axes.T)

    def _due(self, codes, tokens):
        """Which codes are put elsewhere: at most as many as there are tokens, so that no two get the same one."""
        unused, first = self.state["unused"].value, self.state["next_row"].value
        hits, _ = code_sums(jnp.zeros((len(codes), 1)), codes, self.codes, self.mesh)
        longest = math.ceil(self.patience * self.codes / len(codes))
        waited = jnp.where(hits > 0, 0, unused + 1)
        turns = min(tokens, math.ceil(2 * len(codes) / self.patience))
        turn = (jnp.arange(self.codes) - first) % self.codes < turns
        due = turn & ((unused == NEVER) | (waited > longest))
        waited = jnp.where(unused == NEVER, NEVER, jnp.minimum(waited, longest))
        self.state["unused"].value = jnp.where(due, 0, waited)
        self.state["next_row"].value = (first + turns) % self.codes
        return due


def _dot(a, b):
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
