"""The smallest real run: bundled photographs, 8 x 8 grids, 64 codes. Shared by the tests of task, loop and program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fvq_jax.runtime.names import path_name
from fvq_jax.tasks import default_config, task_of
from fvq_jax.training.state import TrainState
from fvq_jax.training.step import TrainStep


def tiny_config(**changes) -> ConfigDict:
    """A valid config that compiles in seconds; `changes` by full name, for instance {"optim.hold": 0.5}."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "steps": 4,
            "epochs": 0.0,
            "batch_size": 16,
            "tokenizer.ch": 32,
            "tokenizer.ch_mult": (1, 1),
            "tokenizer.num_res_blocks": 1,
            "tokenizer.attention_levels": (),  # there is attention in the middle all the same
            "tokenizer.z_channels": 8,
            "tokenizer.quantizer.codebook_size": 64,
            "tokenizer.quantizer.code_dim": 8,
            "tokenizer.quantizer.bridge": "XS/2",
            "tokenizer.dtype": "float32",
            "loss.perceptual_weight": 0.0,
            "adversarial.weight": 0.0,
            "adversarial.start": 1,
            "adversarial.ndf": 8,
            "adversarial.layers": 1,
            "optim.learning_rate": 1e-3,
            "optim.warmup_steps": 1,
            "optim.warmup_epochs": 0.0,
            "data.source": "photos",
            "data.image_size": 16,
            "data.resize_min": 0,
            "data.resize_max": 0,
            "data.num_workers": 0,
            "eval.batch_size": 16,
            "eval.images": 24,
            "log.every_steps": 2,
            "checkpoint.every_steps": 100,
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def spread_codes(params: dict, seed: int = 0) -> dict:
    """The parameters with codes that differ: a random codebook, and a last bridge layer that is not zero.

    At initialisation every latent picks code 0, and a test of search or sharding would pass whatever it does.
    """
    rng = np.random.default_rng(seed)

    def spread(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("quantizer/codebook") or "/recover/kernel" in name:
            value = rng.normal(size=leaf.shape).astype(np.float32)
            return jax.device_put(value * (1.0 if name.endswith("codebook") else 0.05), leaf.sharding)
        return leaf

    return jax.tree.map_with_path(spread, params)


def make_step(config: ConfigDict, mesh: Mesh, total_steps: int = 100, warmup_steps: int = 0) -> TrainStep:
    """The training step of a run with this config."""
    return TrainStep.of(task_of(config)(config, mesh), config, mesh, total_steps, warmup_steps)


@functools.cache
def abstract_state_of(step: TrainStep) -> TrainState:
    """Shapes and layout of the state, traced once."""
    return step.abstract()


def random_state(step: TrainStep, seed: int = 0, at: int = 0) -> TrainState:
    """A state at step `at` whose codes differ, drawn by numpy: to compile `init` takes longer than most losses take.

    As `init` leaves them, moments are zero and the moving average (if any) starts at the parameters.
    """
    rng = np.random.default_rng(seed)

    def place(value, leaf):
        value = np.asarray(value, leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    def parameter(path, leaf):
        name, noise = path_name(path), rng.normal(size=leaf.shape)
        if name.endswith("/kernel"):
            return place(noise / np.sqrt(3 * np.prod(leaf.shape[:-1])), leaf)
        if name.endswith("/scale"):
            return place(1 + 0.02 * noise, leaf)
        return place(noise if name.endswith("codebook") else 0.02 * noise, leaf)

    def start(path, leaf):
        return place(np.full(leaf.shape, float(path_name(path).endswith("/var"))), leaf)

    abstract = abstract_state_of(step)
    state = jax.tree.map_with_path(start, abstract)
    networks = {
        name: network.replace(params=jax.tree.map_with_path(parameter, abstract.networks[name].params))
        for name, network in state.networks.items()
    }
    ema = jax.tree.map(jnp.copy, networks["tokenizer"].params) if state.ema else {}
    return state.replace(step=place(at, abstract.step), networks=networks, ema=ema)


def random_images(n: int, size: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 [n, size, size, 3]: noise of 4 x 4 cells, enlarged."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (n, size // 4, size // 4, 3), dtype=np.uint8)
    return cells.repeat(4, axis=1).repeat(4, axis=2)
