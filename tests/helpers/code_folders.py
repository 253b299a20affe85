"""Folders of codes, and what makes them without a network."""

import pathlib

import numpy as np

from fvq_jax.data.extracted_codes import CODES, pack, smallest_type
from fvq_jax.data.extraction import Encoder
from fvq_jax.data.shards import Manifest, ShardWriter


def write_codes(out: pathlib.Path, codes: np.ndarray, labels, *, shard_size: int = 1000, **changes) -> pathlib.Path:
    """A folder of these codes, [n, scales, crops, *grid]; `changes` are of the plan in its manifest."""
    vocab = changes.get("vocab", 512)
    plan = {
        "format": CODES.format,
        "tokenizer": "0123456789abcdef",
        "vocab": vocab,
        "grid": list(codes.shape[3:]),
        "dtype": smallest_type(vocab).str,
        "condition": "none",
        "size": 32,
        "cropping": "ten" if codes.shape[2] == 10 else "random",
        "crops": codes.shape[2],
        "scales": [1.1, 1.05][: codes.shape[1]],
        "classes": 10,
        "class_names": [],
    } | changes
    out.mkdir(parents=True)
    shards = []
    for start in range(0, len(codes), shard_size):
        with ShardWriter(out / f"codes-{start:05d}.array_record") as writer:
            for index in range(start, min(start + shard_size, len(codes))):
                writer.write(pack(codes[index].astype(plan["dtype"]), int(labels[index]), f"a/{index}.png"))
        shards.append(writer.shard)
    Manifest(plan, tuple(shards)).write(out)
    return out


def pixel_encoder(size: int, *, vocab: int = 700, **changes) -> Encoder:
    """Every second pixel becomes a code: the sum of its colours, plus its class, modulo `vocab`.

    `changes` are of other fields.
    """

    def encode(images, labels):
        return (images[:, ::2, ::2].astype(np.int32).sum(-1) + labels[:, None, None]) % vocab

    grid = (-(-size // 2), -(-size // 2))
    return Encoder(
        **{"encode": encode, "fingerprint": "fedcba9876543210", "path": "/somewhere", "vocab": vocab, "grid": grid}
        | changes
    )
