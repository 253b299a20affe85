"""The sources, by their names in a config. What each is, and how to prepare it: docs/data.md."""

from pathlib import Path
from typing import Literal

from fvq_jax.data.array_record import ArrayRecordSource
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.photos import PhotoSource
from fvq_jax.data.record import Source
from fvq_jax.data.shards import MANIFEST
from fvq_jax.runtime.errors import InputError

SOURCES = ("tfds", "folder", "array_record", "photos")


def kind_of(path: str) -> str:
    """The name in SOURCES of the pictures that a command line names by one word: `photos`, or else a folder.

    A folder named photos is given as ./photos. One that `fvq_jax.data.prepare` wrote has a manifest.
    """
    return "photos" if path == "photos" else "array_record" if (Path(path) / MANIFEST).is_file() else "folder"


def make_source(
    source: str,
    split: Literal["train", "eval"],
    *,
    image_size: int,
    train_dir: str = "",
    eval_dir: str = "",
    tfds_name: str = "",
    tfds_dir: str = "",
    train_split: str = "",
    eval_split: str = "",
    eval_images: int = 0,
) -> Source:
    """The source a config names, for training or for evaluation; arguments as in the config's `data`.

    `eval_images` is the number of crops cut for `photos` (0: 2,048); other sources are taken whole (an
    evaluation takes a `Sample` of them). Listing a large folder takes a while: make a source once, for every
    evaluation. Raises InputError for data that are missing or wrong.
    """
    if source == "photos":
        return PhotoSource(image_size, split, eval_images or 2048)
    if source == "tfds":
        # Imported here, since it takes seconds.
        from fvq_jax.data.tfds import TfdsSource

        return TfdsSource(tfds_name, train_split if split == "train" else eval_split, tfds_dir)
    if source not in SOURCES:
        raise InputError(f"data.source={source!r} is unknown: use one of {', '.join(SOURCES)}")
    field, root = ("train_dir", train_dir) if split == "train" else ("eval_dir", eval_dir)
    if not root:
        raise InputError(f"data.source={source!r} needs data.{field}: the folder of its pictures")
    return FolderSource(root) if source == "folder" else ArrayRecordSource(root)
