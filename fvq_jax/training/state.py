"""The training state, a pytree of the same form for every task, and its creation on the devices of the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fvq_jax.runtime.mesh import Rules, shardings

# The layout of the counters that every state has, its own and those inside optimizers.
RULES: Rules = ((r"^(step|skipped)$", P()), (r"^networks/[^/]+/opt_state/(.*/)?count$", P()))


@struct.dataclass
class NetworkState:
    """One network: trained parameters, its optimizer's state, and all its other variables by collection ({} if none).

    The variables change without a gradient, for instance BatchNorm statistics or a codebook that is a moving average.
    """

    params: Any
    opt_state: Any
    variables: Any

    def all_variables(self) -> dict[str, Any]:
        """Parameters and variables together, as Linen's `apply` takes them."""
        return {"params": self.params, **self.variables}


@struct.dataclass
class TrainState:
    """All that training carries from step to step. Leaves are arrays, or their shapes or layouts.

    Attributes:
      step: int32, steps done; also the position in the data.
      skipped: int32, how many of them were not applied because something was not finite.
      networks: a `NetworkState` by name, for instance tokenizer and discriminator.
      ema: moving average of the main network's parameters, {} if there is none.
    """

    step: Any
    skipped: Any
    networks: dict[str, Any]
    ema: Any

    def with_variables(self, variables: dict[str, Any]) -> "TrainState":
        """This state with new variables, by network (parameters excluded); other networks keep theirs."""
        changed = {name: self.networks[name].replace(variables=value) for name, value in variables.items()}
        return dataclasses.replace(self, networks={**self.networks, **changed})


def with_params(state: TrainState, main: str, params: Any) -> TrainState:
    """The state in which the main network and its moving average have `params` (host arrays), laid out as before."""

    def place(value, leaf):
        value = np.asarray(value, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    network = state.networks[main]
    network = network.replace(params=jax.tree.map(place, params, network.params))
    ema = jax.tree.map(place, params, state.ema) if state.ema else state.ema
    return dataclasses.replace(state, networks={**state.networks, main: network}, ema=ema)


def abstract_state(init: Callable[[jax.Array], TrainState], mesh: Mesh, rules: Rules) -> TrainState:
    """Shapes, dtypes and layout of the state that `init` makes, without making it; `rules` are the task's."""
    abstract = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings(abstract, mesh, (*RULES, *rules)),
    )


def create_state(init: Callable[[jax.Array], TrainState], seed: int, abstract: TrainState) -> TrainState:
    """Runs `init(key)` so that every array is made in its layout; a divided array is never whole on one device.

    `abstract` is what `abstract_state` says about `init`.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=layout)(jax.random.key(seed))
