import json
import os
import pickle
import resource

import numpy as np
import pytest

from fvq_jax.data.array_record import PICTURES, ArrayRecordSource, pack, unpack
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.pipeline import eval_batches, train_batches
from fvq_jax.data.shards import Manifest, allow_open_files
from fvq_jax.runtime.errors import InputError
from tests.data.test_prepare import run
from tests.helpers.pictures import damage, write_pictures

COUNT = 230


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three formats in two classes and beside them; one of them is damaged."""
    path = tmp_path_factory.mktemp("pictures")
    endings = ("png", "jpg", "webp")
    names = [f"{('', 'cat/', 'dog/x/')[number % 3]}{number:03}.{endings[number % 4 % 3]}" for number in range(COUNT)]
    damage(write_pictures(path, names)[5])
    return path


@pytest.fixture
def prepared(folder, tmp_path):
    assert run(folder, tmp_path / "prepared") == 0
    return tmp_path / "prepared"


def test_records_are_those_of_the_folder_in_the_same_order(folder, prepared):
    here, there = ArrayRecordSource(prepared), FolderSource(folder)
    assert len(here) == len(there) == COUNT
    assert here.classes == there.classes == ["", "cat", "dog"]
    for index in range(COUNT):
        assert here[index] == there[index]
        assert here.name(index) == f"{prepared} record {index}: {there.relative_name(index)}"
    assert here[0]["label"].dtype == np.int32


def test_batches_are_those_of_the_folder(folder, prepared):
    fields = {"image_size": 8, "resize_min": 8, "resize_max": 11, "flip": True, "batch_size": 46, "seed": 3}
    streams = [train_batches(source, **fields) for source in (ArrayRecordSource(prepared), FolderSource(folder))]
    for _ in range(7):
        ours, theirs = (next(stream) for stream in streams)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert [list(stream.skipped.values()) for stream in streams] == [[1], [1]]
    for stream in streams:
        stream.close()


def test_a_worker_process_gets_little_and_reads_the_same(prepared):
    source = ArrayRecordSource(prepared)
    first = source[0]
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000
    assert pickle.loads(pickled)[0] == first


def test_the_fingerprint_changes_with_the_pictures_and_not_with_the_place(folder, prepared, tmp_path):
    fingerprint = ArrayRecordSource(prepared).fingerprint()
    assert fingerprint.startswith(f"{COUNT} records, shards ")
    prepared.rename(tmp_path / "elsewhere")
    assert ArrayRecordSource(tmp_path / "elsewhere").fingerprint() == fingerprint
    assert run(folder, tmp_path / "checked", "--check") == 0
    assert ArrayRecordSource(tmp_path / "checked").fingerprint() != fingerprint


def test_a_damaged_record_is_left_to_the_pipeline_which_counts_it(folder, prepared):
    shard = prepared / "pictures-00001-of-00005.array_record"
    picture = FolderSource(folder)[60]["image"]
    content = bytearray(shard.read_bytes())
    content[content.index(picture) + len(picture) // 2] ^= 255
    shard.write_bytes(content)
    source = ArrayRecordSource(prepared)
    batches = eval_batches(source, image_size=8, batch_size=COUNT)
    assert next(batches)["mask"].sum() == COUNT - 2
    batches.close()
    (name,) = [name for name in batches.skipped if "record 60" in name]
    assert "damaged record" in name


def refusal(root):
    with pytest.raises(InputError) as caught:
        ArrayRecordSource(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_half_a_shard_is_not_read(prepared):
    shard = prepared / "pictures-00001-of-00005.array_record"
    size = shard.stat().st_size
    os.truncate(shard, size - 65536)
    assert f"{shard} has {size - 65536} bytes and not {size}: run python -m fvq_jax.data.prepare" in refusal(prepared)
    shard.unlink()
    assert f"{shard}: No such file or directory: run" in refusal(prepared)


def test_without_a_whole_manifest_nothing_is_read(prepared, tmp_path):
    manifest = prepared / "manifest.json"
    content = json.loads(manifest.read_text())
    damaged = [{**content, "records": 1}, {**content, "shards": [{"file": "x"}]}, {"shards": []}, [], 3]
    for wrong in ["", manifest.read_text()[:500], *map(json.dumps, damaged)]:
        manifest.write_text(wrong)
        assert f"{manifest} is damaged" in refusal(prepared)
    manifest.write_text(json.dumps({**content, "format": "of tomorrow"}))
    assert "says 'of tomorrow', not 'fvq_jax pictures" in refusal(prepared)
    manifest.unlink()
    assert "preparing did not finish" in refusal(prepared)
    assert "nowhere' does not exist" in refusal(tmp_path / "nowhere")
    Manifest({"format": PICTURES.format, "classes": []}, ()).write(prepared)
    assert "holds no picture" in refusal(prepared)


@pytest.mark.parametrize("name", ["cat/é.png", "caf\udce9.png"])
def test_a_record_can_be_unpacked(name):
    assert unpack(pack(b"\x00\xff", 7, name)) == (b"\x00\xff", 7, name)


def test_more_shards_than_files_may_be_open(monkeypatch):
    """Many systems allow 1,024 unless asked, and a data set such as ImageNet has about as many shards."""
    limits, asked = {"now": (1024, 4096)}, []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: asked.append(pair))
    allow_open_files(500)
    assert asked == []
    allow_open_files(1000)
    assert asked == [(4096, 4096)]
    with pytest.raises(InputError, match="5000 shards are read at once, but only 4096 files may be open"):
        allow_open_files(5000)
    limits["now"] = (1024, resource.RLIM_INFINITY)
    allow_open_files(1000)
    assert asked[1:] == [(65536, resource.RLIM_INFINITY)]
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    allow_open_files(10**6)
    assert len(asked) == 2


def test_pictures_prepared_again_without_the_unreadable_are_the_same_but_for_those(folder, prepared, tmp_path):
    assert run(folder, tmp_path / "checked", "--check") == 0
    before, now = ArrayRecordSource(prepared), ArrayRecordSource(tmp_path / "checked")
    assert before.fingerprint() != now.fingerprint()
    assert before.fingerprint_without(["a.png"]) == now.fingerprint_without(["a.png"])
