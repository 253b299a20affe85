"""The settings of the section `data` that name pictures and say how they are cut, with their checks."""

from ml_collections import ConfigDict

from fvq_jax.data.sources import SOURCES
from fvq_jax.data.unreadable import MAX_UNREADABLE
from fvq_jax.runtime.errors import require
from fvq_jax.runtime.fields import Field, Needs

_TFDS = (Needs(("source",), values=("tfds",), misleading=True),)
_FOLDERS = (Needs(("source",), values=("folder", "array_record"), misleading=True),)

PICTURES: dict[str, Field] = {
    "source": Field("tfds", "Where pictures come from, see docs/data.md.", choices=SOURCES, stays=True),
    "tfds_name": Field(
        "imagenet2012", "NAME[/CONFIG][:VERSION] of a data set prepared as array_record.", stays=True, needs=_TFDS
    ),
    "tfds_dir": Field(
        "", "Where TFDS keeps its data sets; empty: TFDS_DATA_DIR or ~/tensorflow_datasets.", needs=_TFDS
    ),
    "train_split": Field("train", "Split of tfds to train on.", stays=True, needs=_TFDS),
    "eval_split": Field("validation", "Split of tfds to evaluate on.", stays=True, needs=_TFDS),
    "train_dir": Field("", "Folder to train on.", needs=_FOLDERS),
    "eval_dir": Field("", "Folder to evaluate on.", needs=_FOLDERS),
    "image_size": Field(256, "Side of the square crops, in pixels.", above=0, stays=True),
    "resize_min": Field(256, "Least length of the shorter side before the random crop; 0: no resizing.", stays=True),
    "resize_max": Field(
        320, "Greatest length of the shorter side before the random crop.", stays=True, needs=(Needs(("resize_min",)),)
    ),
    "max_unreadable": Field(
        MAX_UNREADABLE,
        "Share of the pictures that may be unreadable before a run ends; ten may be in any case, but not over half; "
        "0: none.",
        most=1,
        needs=(Needs(("source",), but=("photos",)),),
    ),
    "flip": Field(True, "Whether a picture is mirrored with probability one half.", stays=True),
}


def check_pictures(data: ConfigDict) -> None:
    """Raises InputError unless the fields of the chosen source are set. It does not look whether the files exist."""
    size = data.image_size
    require(
        data.resize_min == 0 or size <= data.resize_min <= data.resize_max,
        f"data.resize_min {data.resize_min} and data.resize_max {data.resize_max} must satisfy "
        f"image_size {size} <= resize_min <= resize_max, or data.resize_min must be 0 (no resizing)",
    )
    if data.source in ("folder", "array_record"):
        what = "of images" if data.source == "folder" else "written by python -m fvq_jax.data.prepare"
        for name in ("train_dir", "eval_dir"):
            require(bool(data[name]), f"data.{name} is empty: set --config.data.{name}=DIR to a folder {what}")
    if data.source == "tfds":
        for name in ("tfds_name", "train_split", "eval_split"):
            require(bool(data[name]), f"data.{name} is empty: data.source=tfds needs it")
