import contextlib
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fvq_jax.data.pipeline import eval_batches
from fvq_jax.data.tfds import TfdsSource
from fvq_jax.runtime.errors import InputError


def picture(value):
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (value, 0, 255 - value)).save(file, "PNG")
    return file.getvalue()


def write_data_set(data_dir, title, splits, *, pictures=picture, features=None, keys=("image", "label")):
    """A data set as TFDS itself writes it, in its format array_record: pictures 0, 1, ... of labels 0, 1, 2, 0, ..."""
    features = features or {
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
    }

    def example(number):
        values = {"image": io.BytesIO(pictures(number)), "label": number % 3, "file_name": f"{number}.png"}
        return {key: values[key] for key in features}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = title
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=keys
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(count) for split, count in splits.items()}

        def _generate_examples(self, count):
            for number in range(count):
                yield number, example(number)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir / title / "1.2.0"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    write_data_set(path, "tiny_pictures", {"train": 10, "validation": 4})
    return path


def open_source(data_dir, split="train", name="tiny_pictures"):
    return TfdsSource(name, split, str(data_dir))


def contents(source):
    return [(source[index]["image"], int(source[index]["label"])) for index in range(len(source))]


def test_every_picture_comes_as_it_was_stored_with_its_label(data_dir):
    """TFDS shuffles when it writes; the pictures carry their number, so none can have lost its label."""
    source = open_source(data_dir)
    assert source.classes == ["ant", "bee", "cat"]
    assert sorted(contents(source)) == sorted((picture(number), number % 3) for number in range(10))
    assert source[0]["label"].dtype == np.int32
    assert sorted(contents(open_source(data_dir, "validation"))) == sorted((picture(n), n % 3) for n in range(4))
    assert source.name(3) == "tiny_pictures train record 3"


def test_a_part_of_a_split(data_dir):
    whole = contents(open_source(data_dir))
    first, rest = open_source(data_dir, "train[:70%]"), open_source(data_dir, "train[70%:]")
    assert contents(first) + contents(rest) == whole
    assert len(first) == 7
    assert len({source.fingerprint() for source in (first, rest, open_source(data_dir))}) == 3


def test_the_version_can_be_named(data_dir):
    assert len(open_source(data_dir, name="tiny_pictures:1.2.0")) == 10
    with pytest.raises(InputError, match=r"'tiny_pictures:9\.0\.0' is neither known"):
        open_source(data_dir, name="tiny_pictures:9.0.0")


def test_the_environment_can_say_where_data_sets_are(data_dir):
    """As TFDS has it: read once, when it is imported. Neither reading nor decoding brings TensorFlow in."""
    program = (
        "import sys; from fvq_jax.data.tfds import TfdsSource; from fvq_jax.data.decode import decode_image; "
        "source = TfdsSource('tiny_pictures', 'train'); print(len(source), decode_image(source[0]['image']).shape, "
        "any(name.split('.')[0] == 'tensorflow' for name in sys.modules))"
    )
    environment = {"TFDS_DATA_DIR": str(data_dir), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "10 (8, 9, 3) False"


def test_a_worker_process_gets_the_same(data_dir):
    source = open_source(data_dir)
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    again = pickle.loads(pickled)
    assert contents(again) == contents(source)
    assert again.fingerprint() == source.fingerprint()


def test_the_fingerprint_does_not_depend_on_the_place(data_dir, tmp_path):
    write_data_set(tmp_path / "again", "tiny_pictures", {"train": 10, "validation": 4})
    write_data_set(tmp_path / "more", "tiny_pictures", {"train": 11, "validation": 4})
    fingerprint = open_source(data_dir).fingerprint()
    assert fingerprint.startswith("10 records of tiny_pictures/1.2.0, shards ")
    assert open_source(tmp_path / "again").fingerprint() == fingerprint
    assert open_source(tmp_path / "more").fingerprint() != fingerprint


def test_a_damaged_picture_is_left_to_the_pipeline_which_counts_it(tmp_path):
    write_data_set(tmp_path, "tiny_pictures", {"train": 200}, pictures=lambda n: b"no" if n == 7 else picture(n))
    batches = eval_batches(open_source(tmp_path), image_size=8, batch_size=100)
    assert sum(int(batch["mask"].sum()) for batch in batches) == 199
    assert len(batches.skipped) == 1


def test_a_damaged_record_counts_as_a_damaged_picture(tmp_path):
    folder = write_data_set(tmp_path, "tiny_pictures", {"train": 200})
    (file,) = folder.glob("*train.array_record*")
    content = bytearray(file.read_bytes())
    content[content.index(picture(7)) + 20] ^= 255
    file.write_bytes(content)
    batches = eval_batches(open_source(tmp_path), image_size=8, batch_size=100)
    assert sum(int(batch["mask"].sum()) for batch in batches) == 199
    assert len(batches.skipped) == 1


def refusal(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        open_source(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_data_set_that_is_not_prepared_says_what_to_run(tmp_path):
    message = refusal(tmp_path, name="imagenet2012")
    assert f"run tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}" in message


def test_a_data_set_without_random_access_says_what_to_run(tmp_path):
    folder = write_data_set(tmp_path, "tiny_pictures", {"train": 3})
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    message = refusal(tmp_path)
    assert f"in {folder} is in the format tfrecord" in message
    assert "run tfds build tiny_pictures --file_format=array_record" in message


def test_what_is_unknown_incomplete_or_no_picture_is_refused(data_dir, tmp_path):
    assert "'nothing_like_it' is neither known to TensorFlow Datasets nor in" in refusal(
        data_dir, name="nothing_like_it"
    )
    assert "data.tfds_name='no name' cannot be used" in refusal(data_dir, name="no name")
    assert "has no split 'test': Unknown split 'test'" in refusal(data_dir, "test")
    assert "split 'train[:0%]' of data set 'tiny_pictures' holds no picture" in refusal(data_dir, "train[:0%]")
    folder = write_data_set(tmp_path, "tiny_pictures", {"train": 3})
    (file,) = folder.glob("*array_record*")
    file.unlink()
    assert f"is incomplete: {file}: No such file" in refusal(tmp_path)
    write_data_set(tmp_path, "unlabelled", {"train": 3}, features={"image": tfds.features.Image()}, keys=None)
    assert "names no such pair of features" in refusal(tmp_path, name="unlabelled")
    words = {"file_name": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
    write_data_set(tmp_path, "words", {"train": 3}, features=words, keys=("file_name", "label"))
    assert "its feature 'file_name' is none" in refusal(tmp_path, name="words")
