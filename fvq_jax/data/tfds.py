"""Image-classification data sets of TensorFlow Datasets as a source, read without TensorFlow.

They must have been prepared in the format array_record (docs/data.md).
"""

import hashlib
import os

import numpy as np
import tensorflow_datasets as tfds

from fvq_jax.data.decode import UnreadableImageError
from fvq_jax.data.record import Record
from fvq_jax.data.shards import allow_open_files
from fvq_jax.runtime.errors import InputError


class TfdsSource:
    """One split of a prepared data set, in the order of its files, which TFDS shuffled once when it wrote them.

    `name` is NAME[/CONFIG][:VERSION], `split` may be a part such as "train[:90%]", `data_dir` is where TFDS keeps its
    data sets (by default TFDS_DATA_DIR, or else ~/tensorflow_datasets). Labels are those of the data set. Raises
    InputError if it is unknown, not prepared, in another format, incomplete, or not made of pictures with one label.
    """

    def __init__(self, name: str, split: str, data_dir: str = ""):
        self._title = f"{name} {split}"
        builder = _builder(name, data_dir)
        info = builder.info
        if not info.splits:
            raise InputError(
                f"data set {name!r} is not prepared in {builder.data_dir}: run {_how_to_prepare(name, data_dir)}"
            )
        if not isinstance(info.supervised_keys, tuple) or len(info.supervised_keys) != 2:
            raise InputError(f"data set {name!r} is not one of pictures with labels: it names no such pair of features")
        self._image, self._label = info.supervised_keys
        if not isinstance(info.features[self._image], tfds.features.Image):
            raise InputError(f"data set {name!r} is not one of pictures: its feature {self._image!r} is none")
        label = info.features[self._label]
        self.classes: list[str] = list(getattr(label, "names", None) or ())
        try:
            files = info.splits[split].file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            raise InputError(f"data set {name!r} has no split {split!r}: {_first_line(error)}") from error
        if not files:
            raise InputError(f"split {split!r} of data set {name!r} holds no picture")
        try:
            # Pictures stay encoded: those of every source are decoded, and damage is noticed, in one place.
            skip = {self._image: tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split, decoders=skip)
        except NotImplementedError:
            raise InputError(
                f"data set {name!r} in {builder.data_dir} is in the format {info.file_format.value}, which has no "
                f"random access: remove that folder and run {_how_to_prepare(name, data_dir)}"
            ) from None
        digest = hashlib.sha256()
        for file in files:
            shard = os.path.basename(file.filename)
            try:
                size = os.path.getsize(file.filename)
            except OSError as error:
                raise InputError(f"data set {name!r} is incomplete: {file.filename}: {error.strerror}") from error
            digest.update(f"{shard} {size} {file.skip} {file.take}\n".encode())
        self._fingerprint = f"{len(self)} records of {info.full_name}, shards {digest.hexdigest()[:16]}"
        allow_open_files(len(files))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            example = self._records[index]
        except RuntimeError as error:  # the checksum that ArrayRecord keeps of the record does not match
            raise UnreadableImageError(f"damaged record ({error})") from error
        return {"image": example[self._image], "label": np.int32(example[self._label])}

    def name(self, index: int) -> str:
        """Data set, split and number of the record."""
        return f"{self._title} record {index}"

    def fingerprint(self) -> str:
        """How many records of which version, and a hash of names, sizes and used parts of the files."""
        return self._fingerprint


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        where = data_dir or tfds.core.constants.DATA_DIR
        raise InputError(
            f"data set {name!r} is neither known to TensorFlow Datasets nor in {where}: "
            "check data.tfds_name and data.tfds_dir"
        ) from None
    except (ValueError, AssertionError) as error:
        raise InputError(f"data.tfds_name={name!r} cannot be used: {_first_line(error)}") from error


def _how_to_prepare(name: str, data_dir: str) -> str:
    where = f" --data_dir={data_dir}" if data_dir else ""
    return f"tfds build {name} --file_format=array_record{where} (once; see docs/data.md)"


def _first_line(error: Exception) -> str:
    return str(error.args[0] if error.args else error).strip().splitlines()[0]
