"""Reads the golden cases of tests/golden: configuration, weights made by their rule, inputs and expected outputs.

Arrays keep PyTorch's layout and names; turning weights into this package's trees is the job of `fvq_jax.interop`.
"""

import dataclasses
import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One case; the keys of `inputs` and `outputs` have no `input.` / `output.` prefix."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def images(self, name: str = "image") -> jax.Array:
        """Input `name` as the model saw it, channels last: float32 in [-1, 1]."""
        x = self.inputs[name]
        if x.dtype == np.uint8:
            x = x.astype(np.float32) / 127.5 - 1
        return jnp.moveaxis(x, -3, -1)

    def weights_of(self, prefix: str) -> dict[str, np.ndarray]:
        """The weights whose key starts with `prefix`, keyed by the rest (`training_run` has two networks)."""
        return {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}


def load_case(name: str) -> GoldenCase:
    """Case `name`; `weights` is empty for `fvq_vit_folded`, which is only `shapes`."""
    description = json.loads((GOLDEN / f"{name}.json").read_text())
    rules = description.get("state_dict", {})
    shapes = description.get("keys") or {key: rule["shape"] for key, rule in rules.items()}
    arrays = {}
    if (GOLDEN / f"{name}.npz").exists():
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = dict(file)
    networks = ("model.", "discriminator.") if name == "training_run" else ()
    return GoldenCase(
        config=description.get("config", {}),
        shapes={key: tuple(shape) for key, shape in shapes.items()},
        weights={key: _value(key, rule, description["seed"], networks) for key, rule in rules.items()},
        inputs=_without_prefix(arrays, "input."),
        outputs=_without_prefix(arrays, "output."),
    )


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute error over the largest absolute expected value; the shapes must be the same."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {actual.shape} and {expected.shape}")
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def _value(key: str, rule: dict[str, Any], seed: int, networks: tuple[str, ...]) -> np.ndarray:
    if rule["dtype"] != "float32":
        return np.zeros(rule["shape"], rule["dtype"])
    for network in networks:
        key = key.removeprefix(network)
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))
    x = np.asarray(rng.standard_normal(rule["shape"]))
    x = np.abs(x) if rule.get("abs") else x
    return (x * rule["std"] + rule["mean"]).astype(np.float32)


def _without_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
