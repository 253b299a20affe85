import pytest

from fvq_jax.config.checks import validate
from fvq_jax.data.array_record import ArrayRecordSource
from fvq_jax.data.record import Source
from fvq_jax.data.sources import SOURCES, make_source
from fvq_jax.runtime.errors import InputError
from fvq_jax.tasks import task_of
from fvq_jax.tasks.tokenizer.pictures import source_of
from tests.data.test_prepare import run
from tests.data.test_tfds import write_data_set
from tests.helpers.pictures import write_pictures
from tests.helpers.tiny import tiny_config

SIZES = {"folder": (1, 2), "array_record": (1, 2), "photos": (7200, 7), "tfds": (3, 2)}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    write_pictures(root / "folder/train", ("cat/1.png",))
    write_pictures(root / "folder/eval", ("1.png", "2.png"))
    for split in ("train", "eval"):
        assert run(root / "folder" / split, root / "array_record" / split) == 0
    write_data_set(root / "tfds", "tiny_pictures", {"train": 3, "validation": 2})

    def make(source):
        return {
            "image_size": 32,
            "train_dir": str(root / source / "train"),
            "eval_dir": str(root / source / "eval"),
            "tfds_name": "tiny_pictures",
            "tfds_dir": str(root / "tfds"),
            "train_split": "train",
            "eval_split": "validation",
            "eval_images": 7,
        }

    return make


def test_every_source_has_a_test():
    assert set(SIZES) == set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_by_its_name(fields, name):
    train, evaluation = (make_source(name, split, **fields(name)) for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == SIZES[name]
    for source in (train, evaluation):
        assert isinstance(source, Source)
        assert set(source[0]) == {"image", "label"}
        assert source.name(0)
    assert train.fingerprint() != evaluation.fingerprint()


@pytest.mark.parametrize("name", SOURCES)
def test_a_config_names_its_source(fields, name):
    """Every field of the config reaches its source."""
    given = {field: value for field, value in fields(name).items() if field not in ("image_size", "eval_images")}
    used = {"photos": (), "tfds": ("tfds_name", "tfds_dir", "train_split", "eval_split")}
    given = {field: given[field] for field in used.get(name, ("train_dir", "eval_dir"))}
    changes = {f"data.{field}": value for field, value in given.items()}
    config = tiny_config(**changes, **{"data.source": name, "data.image_size": 32, "eval.images": 7})
    validate(config, task_of(config), 8)
    assert tuple(len(source_of(config, split)) for split in ("train", "eval")) == SIZES[name]
    config.update({"eval": {"images": 0, "crops": 11}, "data": {"resize_min": 40, "resize_max": 50}})
    if name == "photos":
        with pytest.raises(InputError, match=r"eval\.crops does not go with data\.source=photos"):
            validate(config, task_of(config), 8)
        return
    validate(config, task_of(config), 8)
    train, crops = (source_of(config, split) for split in ("train", "eval"))
    assert len(train) == SIZES[name][0]
    assert (len(crops), crops[10]["image"].shape) == (11, (32, 32, 3))
    assert crops.fingerprint().startswith("11 crops of 32 pixels, resized to 40..50, seed 0, of ")


def test_the_photographs_have_2048_crops_unless_told(fields):
    assert len(make_source("photos", "eval", **fields("photos") | {"eval_images": 0})) == 2048


def test_what_is_missing_or_unknown_is_refused(fields, tmp_path):
    with pytest.raises(InputError, match=r"source='folder' needs data\.eval_dir"):
        make_source("folder", "eval", image_size=32)
    with pytest.raises(InputError, match=r"source='array_record' needs data\.train_dir"):
        make_source("array_record", "train", image_size=32)
    with pytest.raises(InputError, match="'csv' is unknown: use one of tfds, folder, array_record, photos"):
        make_source("csv", "train", image_size=32)
    with pytest.raises(InputError, match="nowhere"):
        make_source("folder", "train", **fields("folder") | {"train_dir": str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match="nowhere"):
        make_source("array_record", "train", **fields("folder") | {"train_dir": str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match="no such"):
        make_source("tfds", "train", **fields("tfds") | {"tfds_name": "no such"})


def test_a_folder_taken_for_a_prepared_one_is_refused(fields):
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        ArrayRecordSource(fields("folder")["train_dir"])
