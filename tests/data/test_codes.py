import contextlib
import itertools
import json
import pickle

import numpy as np
import pytest
from absl import flags

from fvq_jax.data.codes import CodeSource, code_batches, held_out_batches, open_codes
from fvq_jax.data.extracted_codes import ExtractedCodes, smallest_type
from fvq_jax.data.llamagen_codes import LlamaGenCodes
from fvq_jax.runtime.errors import InputError
from tests.helpers.code_folders import write_codes
from tests.helpers.slow_cases import slow

flags.FLAGS.mark_as_parsed()  # worker processes are handed the parsed flags

COUNT, SCALES, CROPS = 12, 2, 10


def numbered(count=COUNT, scales=SCALES, crops=CROPS, grid=(2, 3)):
    """Codes that say where they are from: [index, scale, crop, and the place in the grid twice more]."""
    codes = np.zeros((count, scales, crops, *grid), np.int64)
    codes[..., 0, 0] = np.arange(count)[:, None, None]
    codes[..., 0, 1] = np.arange(scales)[:, None]
    codes[..., 0, 2] = np.arange(crops)
    codes[..., 1, :] = [300, 301, 302]
    return codes


LABELS = np.arange(COUNT) % 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes") / "out", numbered(), LABELS, shard_size=5)


@pytest.fixture(scope="module")
def source(folder):
    return open_codes(folder)


def take(count, source, **options):
    with contextlib.closing(code_batches(source, **{"batch_size": 4, "seed": 0} | options)) as batches:
        return list(itertools.islice(batches, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def test_records_are_what_was_written(folder, source):
    assert isinstance(source, ExtractedCodes)
    assert isinstance(source, CodeSource)
    assert len(source) == COUNT
    for index in range(COUNT):
        record = source[index]
        np.testing.assert_array_equal(record["codes"], numbered()[index])
        assert record["codes"].dtype == record["label"].dtype == np.int32
        assert record["label"] == LABELS[index]
        assert source.name(index) == f"{folder} record {index}: a/{index}.png"
    info = source.info
    assert (info.tokenizer, info.vocab, info.classes, info.condition) == ("0123456789abcdef", 512, 10, "none")
    assert (info.grid, info.scales, info.crops, info.cropping, info.size) == ((2, 3), (1.1, 1.05), 10, "ten", 32)
    assert (info.length, info.shape) == (6, (2, 10, 2, 3))


@pytest.mark.parametrize(
    ("vocab", "name"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4"), (2**20, "u4")]
)
def test_codes_take_the_smallest_type_that_holds_them(vocab, name, tmp_path):
    assert smallest_type(vocab) == np.dtype(f"<{name}")
    codes = np.full((1, 1, 1, 2, 2), vocab - 1)
    source = open_codes(write_codes(tmp_path / "out", codes, [0], vocab=vocab))
    np.testing.assert_array_equal(source[0]["codes"], codes[0])


def test_a_worker_process_gets_little_and_reads_the_same(source):
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000
    np.testing.assert_array_equal(pickle.loads(pickled)[3]["codes"], source[3]["codes"])


def test_the_fingerprint_changes_with_the_codes_and_not_with_the_place(source, tmp_path):
    elsewhere = write_codes(tmp_path / "same", numbered(), LABELS, shard_size=5)
    assert open_codes(elsewhere).fingerprint() == source.fingerprint()
    changed = numbered()
    changed[3, 0, 0, 0, 0] += 1
    assert open_codes(write_codes(tmp_path / "other", changed, LABELS, shard_size=5)).fingerprint() != (
        source.fingerprint()
    )


def test_a_batch_is_flattened_codes_and_labels(source):
    (batch,) = take(1, source)
    assert batch.keys() == {"codes", "label"}
    assert batch["codes"].dtype == batch["label"].dtype == np.int32
    assert batch["codes"].shape == (4, 6)
    assert (batch["codes"][:, 3:] == [300, 301, 302]).all()  # row by row
    np.testing.assert_array_equal(batch["label"], LABELS[batch["codes"][:, 0]])


def test_every_picture_comes_once_per_epoch_in_a_new_order(source):
    indices = joined(take(9, source), "codes")[:, 0].reshape(3, COUNT)
    for epoch in indices:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in indices}) == 3


def test_scale_and_crop_are_drawn_anew_for_every_picture_and_epoch(source):
    """600 draws of 20 kinds: 30 of each are expected, with a standard deviation of 5.3."""
    rows = joined(take(12, source, batch_size=50), "codes")
    counts = np.zeros((SCALES, CROPS), int)
    np.add.at(counts, (rows[:, 1], rows[:, 2]), 1)
    assert counts.min() > 10
    assert counts.max() < 52
    assert abs(counts.sum(1)[0] - 300) < 50
    one = rows[rows[:, 0] == 5][:, 1:3]
    assert len({tuple(drawn) for drawn in one.tolist()}) > 15


def test_the_draw_depends_on_seed_epoch_and_picture_alone(source):
    """Not on the batch, in which it stands."""
    expected = joined(take(6, source), "codes")
    np.testing.assert_array_equal(joined(take(12, source, batch_size=2), "codes"), expected)
    np.testing.assert_array_equal(joined(take(1, source, batch_size=24), "codes"), expected)
    assert not np.array_equal(joined(take(6, source, seed=1), "codes"), expected)


@pytest.mark.parametrize("process_count", [4, *slow(2)])
def test_hosts_hold_contiguous_rows_of_the_same_global_batch(source, process_count):
    parts = [take(7, source, process_index=index, process_count=process_count) for index in range(process_count)]
    whole = [{name: joined(batches, name) for name in batches[0]} for batches in zip(*parts, strict=True)]
    assert_same(whole, take(7, source))


def test_worker_processes_give_the_batches_of_one_process(source):
    assert_same(take(7, source, start_step=2, num_workers=2), take(7, source, start_step=2))


def test_starting_at_a_step_continues_the_stream(source):
    assert_same(take(4, source, batch_size=5, start_step=3), take(7, source, batch_size=5)[3:])


def held_out(source, **options):
    with contextlib.closing(held_out_batches(source, **{"batch_size": 8} | options)) as batches:
        return list(batches)


def test_held_out_batches_show_the_centre_of_every_picture_once(source):
    batches = held_out(source)
    assert [batch["codes"].shape for batch in batches] == [(8, 6)] * 2
    mask, codes = joined(batches, "mask"), joined(batches, "codes")
    assert mask.tolist() == [True] * COUNT + [False] * 4
    np.testing.assert_array_equal(codes[:COUNT, :3], [[index, 0, 4] for index in range(COUNT)])
    np.testing.assert_array_equal(joined(batches, "label")[:COUNT], LABELS)
    parts = [held_out(source, process_index=index, process_count=2) for index in range(2)]
    whole = [{name: joined(pair, name) for name in pair[0]} for pair in zip(*parts, strict=True)]
    assert_same(whole, batches)


def test_other_croppings_are_held_out_by_their_first_crop(tmp_path):
    source = open_codes(write_codes(tmp_path / "out", numbered(crops=3), LABELS))
    np.testing.assert_array_equal(joined(held_out(source), "codes")[:COUNT, 2], np.zeros(COUNT))


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"vocab": 302}, "has the code 302, and codes must be in 0..301"),
        ({"classes": 9}, "has the label 9, and labels must be in 0..8"),
    ],
)
def test_codes_and_labels_that_a_generator_cannot_take_are_named(source, limits, message):
    with pytest.raises(InputError) as caught:
        take(3, source, num_workers=int("vocab" in limits), **limits)
    assert message in one_line(caught)
    assert " record " in str(caught.value)
    with pytest.raises(InputError) as caught:
        held_out(source, **limits)
    assert message in one_line(caught)
    take(3, source, vocab=303, classes=10)


def test_sizes_that_cannot_work_are_refused(source):
    with pytest.raises(InputError, match="batch size 5 must be a positive multiple of the 2 processes"):
        take(1, source, batch_size=5, process_count=2)
    with pytest.raises(InputError, match="batch size 0 must be"):
        held_out(source, batch_size=0)
    with pytest.raises(InputError, match="seed=-1"):
        take(1, source, seed=-1)


def test_a_damaged_record_is_named_with_its_shard(tmp_path):
    folder = write_codes(tmp_path / "out", numbered(), LABELS, shard_size=5)
    shard = folder / "codes-00005.array_record"
    content = bytearray(shard.read_bytes())
    content[content.index(b"a/7.png")] ^= 255
    shard.write_bytes(content)
    source = open_codes(folder)
    with pytest.raises(InputError) as caught:
        source[7]
    line = one_line(caught)
    assert f"record 7 of {folder} is damaged, in {shard.name}" in line
    assert f"remove that file and run python -m fvq_jax.tokenize extract --out={folder} again" in line
    with pytest.raises(InputError, match=r"record 7 .* is damaged, in codes-00005"):
        held_out(source)
    np.testing.assert_array_equal(source[4]["codes"], numbered()[4])


def refusal(path):
    with pytest.raises(InputError) as caught:
        open_codes(path)
    return one_line(caught)


def test_what_is_no_whole_folder_of_codes_is_refused(tmp_path):
    folder = write_codes(tmp_path / "out", numbered(), LABELS, shard_size=5)
    manifest, shard = folder / "manifest.json", folder / "codes-00005.array_record"
    content = json.loads(manifest.read_text())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} has {content['shards'][1]['bytes'] - 1} bytes and not" in refusal(folder)
    shard.unlink()
    assert f"{shard}: No such file" in refusal(folder)
    manifest.write_text(json.dumps({**content, "format": "fvq_jax pictures in ArrayRecord, version 1"}))
    assert "says 'fvq_jax pictures in ArrayRecord, version 1', not 'fvq_jax codes" in refusal(folder)
    whole = {**content, "shards": content["shards"][:1], "records": 5}
    manifest.write_text(json.dumps({name: value for name, value in whole.items() if name != "grid"}))
    assert f"{manifest} is damaged" in refusal(folder)
    manifest.write_text("")
    assert f"{manifest} is damaged: delete it and run python -m fvq_jax.tokenize extract" in refusal(folder)
    manifest.unlink()
    assert "extracting did not finish, run python -m fvq_jax.tokenize extract" in refusal(folder)
    assert "nowhere' does not exist" in refusal(tmp_path / "nowhere")
    assert "holds no picture" in refusal(write_codes(tmp_path / "empty", numbered(0), []))


def write_llamagen(root, codes, labels, size=32):
    """Files as LlamaGen's program writes them: codes int64 [1, crops, t] and labels int64 [1]."""
    for name in ("codes", "labels"):
        (root / f"imagenet{size}_{name}").mkdir(parents=True)
    for index, (code, label) in enumerate(zip(codes, labels, strict=True)):
        np.save(root / f"imagenet{size}_codes" / f"{index}.npy", code.reshape(1, len(code), -1).astype(np.int64))
        np.save(root / f"imagenet{size}_labels" / f"{index}.npy", np.array([label]))
    return root


@pytest.fixture
def llamagen(tmp_path):
    codes = numbered(grid=(3, 3)).reshape(COUNT, SCALES, CROPS, 3, 3)
    write_llamagen(tmp_path / "flip_ten_crop_105", codes[:, 1], LABELS)
    return write_llamagen(tmp_path / "flip_ten_crop", codes[:, 0], LABELS)


def test_the_files_of_llamagen_are_read_with_their_second_scale(llamagen, tmp_path):
    source = open_codes(llamagen)
    assert isinstance(source, LlamaGenCodes)
    assert isinstance(source, CodeSource)
    assert len(source) == COUNT
    info = source.info
    assert (info.tokenizer, info.condition, info.vocab, info.classes, info.grid) == ("", "", 0, 0, (3, 3))
    assert (info.scales, info.crops, info.cropping, info.size) == ((1.1, 1.05), 10, "ten", 32)
    same = open_codes(write_codes(tmp_path / "same", numbered(grid=(3, 3)), LABELS))
    for index in range(COUNT):
        np.testing.assert_array_equal(source[index]["codes"], same[index]["codes"])
        assert source[index]["label"] == same[index]["label"] == LABELS[index]
    assert source.name(3) == str(llamagen / "imagenet32_codes" / "3.npy")
    assert_same(take(7, source), take(7, same))
    assert_same(held_out(source), held_out(same))
    assert len(pickle.dumps(source)) < 5000
    assert source.fingerprint().startswith("12 pictures, 2 scales, codes ")


def test_files_of_llamagen_at_one_scale_with_a_mirrored_crop(tmp_path):
    root = write_llamagen(tmp_path / "flip", numbered(scales=1, crops=2, grid=(3, 3))[:, 0], LABELS)
    write_llamagen(tmp_path / "flip_105", numbered(scales=1, crops=2, grid=(3, 3))[:, 0], LABELS)
    source = open_codes(root)
    assert source.info.shape == (1, 2, 3, 3)
    assert source.info.first_crop == 0


def test_damaged_files_of_llamagen_are_refused(llamagen):
    codes, labels = llamagen / "imagenet32_codes", llamagen / "imagenet32_labels"
    np.save(codes / "5.npy", np.zeros((1, 10, 4), np.int64))
    with pytest.raises(InputError, match=r"5\.npy holds codes \[10, 4\], and the first file \[10, 9\]"):
        open_codes(llamagen)[5]
    np.save(codes / "6.npy", np.zeros((1, 10, 9)))
    with pytest.raises(InputError, match=r"6\.npy holds no whole numbers"):
        open_codes(llamagen)[6]
    (codes / "7.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot read .*7\.npy"):
        open_codes(llamagen)[7]
    np.save(labels / "8.npy", np.zeros(2, np.int64))
    with pytest.raises(InputError, match=r"8\.npy holds 2 labels"):
        open_codes(llamagen)[8]
    (labels / "11.npy").unlink()
    assert "12 files of codes and 11 of labels" in refusal(llamagen)
    (codes / "3.npy").unlink()
    (labels / "3.npy").unlink()
    assert "must hold 0.npy, 1.npy and so on without a gap" in refusal(llamagen)
    (llamagen / "imagenet64_codes").mkdir()
    assert "codes of several sizes: imagenet32_codes, imagenet64_codes" in refusal(llamagen)


def test_a_second_scale_of_other_pictures_and_odd_grids_are_refused(llamagen, tmp_path):
    second = llamagen.with_name("flip_ten_crop_105")
    for name in ("codes", "labels"):
        (second / f"imagenet32_{name}" / "11.npy").unlink()
    assert f"{second} holds the codes of 11 pictures, and {llamagen} of 12" in refusal(llamagen)
    odd = write_llamagen(tmp_path / "odd", numbered(scales=1, crops=2)[:, 0], LABELS)
    assert "6 codes of a crop make no square grid" in refusal(odd)
    empty = write_llamagen(tmp_path / "empty", [], [])
    assert "must hold 0.npy" in refusal(empty)
