"""The smallest training of a generator: 4 x 4 grids of 64 codes that a Markov chain of every class made."""

import functools
import pathlib

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from fvq_jax.tasks import default_config
from tests.helpers.code_folders import write_codes

VOCAB, CLASSES, GRID = 64, 4, (4, 4)


def chain_codes(images: int, seed: int = 0, crops: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """(codes [images, crops, 16], labels [images]): the class and a code decide two that may follow it."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % CLASSES
    following = np.random.default_rng(99).integers(0, VOCAB, (CLASSES, VOCAB, 2))
    codes = np.empty((images, crops, GRID[0] * GRID[1]), np.int64)
    code = rng.integers(0, VOCAB, (images, crops))
    for position in range(codes.shape[-1]):
        codes[..., position] = code
        code = following[labels[:, None], code, rng.integers(0, 2, code.shape)]
    return codes, labels


def write_splits(folder: pathlib.Path, train: int = 64, held_out: int = 24, **changes) -> pathlib.Path:
    """Folders of codes `folder`/train and `folder`/eval; `changes` are of their manifests. Returns `folder`."""
    plan = {"vocab": VOCAB, "classes": CLASSES, "size": 16} | changes
    for split, images, seed in (("train", train, 0), ("eval", held_out, 1)):
        codes, labels = chain_codes(images, seed)
        write_codes(folder / split, codes.reshape(images, 1, -1, *GRID), labels, **plan)
    return folder


def tiny_config(folder: pathlib.Path | str = "codes", **changes) -> ConfigDict:
    """A valid config; codes are in `folder`/train and `folder`/eval. `changes` by full name."""
    config = default_config("generator")
    config.update_from_flattened_dict(
        {
            "steps": 4,
            "epochs": 0.0,
            "batch_size": 16,
            "generator.vocab": VOCAB,
            "generator.classes": CLASSES,
            "generator.grid": GRID,
            "generator.layers": 2,
            "generator.width": 64,
            "generator.heads": 4,
            "generator.dtype": "float32",
            "optim.learning_rate": 1e-3,
            "optim.warmup_epochs": 0.0,
            "data.train_dir": f"{folder}/train",
            "data.eval_dir": f"{folder}/eval",
            "data.num_workers": 0,
            "eval.batch_size": 16,
            "log.every_steps": 2,
            "checkpoint.every_steps": 2,
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def mesh_of(data: int, codebook: int) -> Mesh:
    """A mesh of the first simulated devices."""
    return jax.make_mesh(
        (data, codebook),
        ("data", "codebook"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: data * codebook],
    )


@functools.cache
def random_batch(images: int, vocab: int = VOCAB, length: int = GRID[0] * GRID[1], seed: int = 0):
    """Random codes and labels."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, vocab, (images, length), dtype=np.int32)
    return {"codes": codes, "label": rng.integers(0, CLASSES, images, dtype=np.int32)}
