"""The pictures that a tokenizer's config names, and what to call them."""

from typing import Literal

from ml_collections import ConfigDict

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.record import Source
from fvq_jax.data.sources import make_source


def source_of(config: ConfigDict, split: Literal["train", "eval"]) -> Source:
    """The pictures that a config names, or random crops of them. InputError if they are not available."""
    data, crops = config.data, config.eval.crops if split == "eval" else 0
    pictures = make_source(
        data.source,
        split,
        image_size=data.image_size,
        train_dir=data.train_dir,
        eval_dir=data.eval_dir,
        tfds_name=data.tfds_name,
        tfds_dir=data.tfds_dir,
        train_split=data.train_split,
        eval_split=data.eval_split,
        eval_images=config.eval.images,
    )
    return RandomCrops(pictures, crops, data.image_size, data.resize_min, data.resize_max) if crops else pictures


def data_name(config: ConfigDict) -> str:
    """What a report calls the evaluation set of a config."""
    data = config.data
    what = {"photos": "bundled photographs, held-out regions", "tfds": f"{data.tfds_name} {data.eval_split}"}
    return what.get(data.source, data.eval_dir)
