import contextlib
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from fvq_jax.data import pipeline
from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.decode import decode_image
from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.photos import PhotoSource
from fvq_jax.data.transforms import center_no_resize
from fvq_jax.runtime.errors import InputError
from tests.helpers import odd_pictures
from tests.helpers.slow_cases import slow

flags.FLAGS.mark_as_parsed()  # worker processes are handed the parsed flags

SIZE = 8
CROP = {"image_size": SIZE, "resize_min": 0, "resize_max": 0, "flip": True}


@pytest.fixture(scope="module")
def photos():
    return PhotoSource(SIZE, "train")


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of `count` one-colour pictures, file number i of colour i, those in `damaged` unreadable."""

    def make(count, damaged=(), size=(12, 10)):
        for index in range(count):
            path = tmp_path / f"class{index % 2}" / f"{index:03}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", size, (index, index, index)).save(path)
            if index in damaged:
                path.write_bytes(b"damaged")
        return FolderSource(tmp_path)

    return make


def take(count, source, **options):
    with contextlib.closing(pipeline.train_batches(source, **CROP | {"seed": 0, **options})) as batches:
        return [{name: np.array(value) for name, value in batch.items()} for batch in itertools.islice(batches, count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def differ(left, right):
    return any(not np.array_equal(a["image"], b["image"]) for a, b in zip(left, right, strict=True))


def join_hosts(parts):
    return [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*parts, strict=True)
    ]


def test_batches_are_uint8_images_and_int32_labels(photos):
    (batch,) = take(1, photos, batch_size=6)
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (6, SIZE, SIZE, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (6,)
    assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("process_count", [4, *slow(2)])
def test_hosts_hold_contiguous_rows_of_the_same_global_batch(photos, process_count):
    parts = [
        take(5, photos, batch_size=8, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    assert_same(join_hosts(parts), take(5, photos, batch_size=8))


def test_one_row_per_host(photos):
    parts = [take(2, photos, batch_size=3, process_index=index, process_count=3) for index in range(3)]
    assert_same(join_hosts(parts), take(2, photos, batch_size=3))


@pytest.mark.slow
def test_worker_processes_give_the_batches_of_one_process(photos):
    expected = take(7, photos, batch_size=4, start_step=3)
    assert_same(take(7, photos, batch_size=4, start_step=3, num_workers=2), expected)
    second_half = take(7, photos, batch_size=4, start_step=3, num_workers=3, process_index=1, process_count=2)
    assert_same(second_half, [{name: value[2:] for name, value in batch.items()} for batch in expected])


def test_starting_at_a_step_continues_the_stream(photos):
    assert_same(take(4, photos, batch_size=6, start_step=5), take(9, photos, batch_size=6)[5:])


def test_restart_is_exact_across_epochs(folder):
    source = folder(5)
    assert_same(take(4, source, batch_size=4, start_step=3), take(7, source, batch_size=4)[3:])


def test_the_seed_decides(photos):
    assert_same(take(2, photos, batch_size=6, seed=3), take(2, photos, batch_size=6, seed=3))
    assert differ(take(2, photos, batch_size=6, seed=3), take(2, photos, batch_size=6, seed=4))
    with pytest.raises(InputError, match="seed=-1"):
        take(1, photos, batch_size=6, seed=-1)


def test_every_file_comes_once_per_epoch_in_a_new_order(folder):
    source = folder(12)
    colours = np.concatenate([batch["image"][:, 0, 0, 0] for batch in take(9, source, batch_size=4)])
    first, second, third = colours.reshape(3, 12)
    for epoch in (first, second, third):
        assert sorted(epoch) == list(range(12))
    assert list(first) != list(second) != list(third)


def test_the_order_depends_on_seed_and_epoch_alone(folder):
    """Not on the batch, which runs across the ends of epochs, nor on what is done to the pictures."""
    source = folder(10)

    def order(steps, **options):
        return np.concatenate([batch["image"][:, 0, 0, 0] for batch in take(steps, source, **options)]).tolist()

    expected = order(6, batch_size=5)
    assert [sorted(epoch) for epoch in np.reshape(expected, (3, 10)).tolist()] == [list(range(10))] * 3
    assert order(10, batch_size=3) == expected
    assert order(1, batch_size=30, flip=False, resize_min=9, resize_max=12) == expected
    assert order(1, batch_size=10, start_step=1) == expected[10:20]
    assert order(6, batch_size=5, seed=1) != expected


def test_hosts_share_an_epoch_without_overlap(folder):
    source = folder(12)
    shares = [
        np.concatenate(
            [batch["image"][:, 0, 0, 0] for batch in take(2, source, batch_size=6, process_index=i, process_count=3)]
        ).tolist()
        for i in range(3)
    ]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert sorted(colour for share in shares for colour in share) == list(range(12))


def test_labels_belong_to_their_pictures(folder):
    for batch in take(4, folder(12), batch_size=4):
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 2)


def test_flip_off_never_mirrors_and_on_mirrors_half(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 20, dtype=np.uint8)[None, :, None], (12, 12, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    source = FolderSource(tmp_path)

    def rising(flip):
        image = np.concatenate([batch["image"] for batch in take(5, source, batch_size=20, flip=flip)])
        return image[:, 0, 0, 0] < image[:, 0, -1, 0]

    assert rising(flip=False).all()
    assert 30 < rising(flip=True).sum() < 70


def test_resizing_range_is_respected(tmp_path):
    # A ramp over the width: the slope of a crop tells how far the picture was resized.
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (128, 128, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    source = FolderSource(tmp_path)

    def slopes(**options):
        batches = take(3, source, batch_size=20, image_size=16, flip=False, **options)
        image = np.concatenate([batch["image"] for batch in batches])
        return (image[:, 0, 12, 0].astype(float) - image[:, 0, 4, 0]) / 8

    np.testing.assert_allclose(slopes(resize_min=32, resize_max=32), 256 / 32, atol=0.2)
    drawn = slopes(resize_min=32, resize_max=64)
    assert drawn.min() > 256 / 64 - 0.3
    assert drawn.max() < 256 / 32 + 0.3
    assert np.ptp(drawn) > 2
    np.testing.assert_array_equal(slopes(resize_min=0, resize_max=0), 2)


@pytest.mark.parametrize(("low", "high"), [(4, 20), (20, 16)])
def test_impossible_resizing_is_refused(photos, low, high):
    with pytest.raises(InputError, match=rf"resize_min={low} and data\.resize_max={high} .*\(8\)"):
        take(1, photos, batch_size=4, resize_min=low, resize_max=high)


@pytest.mark.parametrize("batch_size", [0, 6])
def test_a_batch_that_hosts_cannot_share_is_refused(photos, batch_size):
    with pytest.raises(InputError, match=f"batch size {batch_size} .* multiple of the 4"):
        take(1, photos, batch_size=batch_size, process_count=4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_replaced_named_and_counted(folder, tmp_path, monkeypatch, num_workers):
    messages = []
    monkeypatch.setattr(pipeline.logging, "warning", lambda text, *args: messages.append(text % args))
    source = folder(100, damaged=[21])
    name = next(source.relative_name(index) for index in range(100) if source.name(index).endswith("021.png"))
    batches = pipeline.train_batches(source, **CROP, batch_size=10, seed=0, num_workers=num_workers)
    with contextlib.closing(batches):
        colours = [batch["image"][:, 0, 0, 0] for batch in itertools.islice(batches, 30)]
    assert 21 not in np.concatenate(colours)
    assert len(np.concatenate(colours)) == 300
    assert batches.skipped == {name: 3}
    (message,) = messages
    assert message == f"skipped {str(tmp_path / name)!r}: not a JPEG, PNG, WebP, GIF or BMP file"


@pytest.mark.parametrize(("count", "damaged", "share"), [(61, 11, 0.01), (12, 7, 0.01), (120, 3, 0.02), (120, 1, 0)])
def test_more_damaged_than_may_be_stop_the_run(folder, count, damaged, share, monkeypatch):
    monkeypatch.setattr("fvq_jax.data.unreadable._ALWAYS", 2 if share == 0.02 else 10)
    source, most = folder(count, damaged=range(damaged)), damaged - 1
    said = rf"^{damaged} of {count} pictures are unreadable, and {most} may be \(data\.max_unreadable={share}\): "
    with pytest.raises(
        InputError, match=said + r"'/\S*png' \(not a JPEG, [^\n]*; raise .*prepare FOLDER OUT --check"
    ) as e:
        take(count, source, batch_size=10, max_unreadable=share)
    assert len(str(e.value)) < 800
    options = {"image_size": SIZE, "batch_size": 10}
    with pytest.raises(InputError, match=said):
        list(pipeline.eval_batches(source, **options, max_unreadable=share))
    list(pipeline.eval_batches(folder(count, damaged=range(most)), **options, max_unreadable=share or 0.01))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_long_search_for_a_readable_picture(folder, num_workers):
    """As many in a row as would stop the run do so at once, in a worker process too."""
    source = folder(150, damaged=range(150))
    with pytest.raises(InputError, match=r"^11 of 150 pictures are unreadable, and 10 may be .*'/.*png' \(not a JPEG"):
        take(1, source, batch_size=10, num_workers=num_workers)


def test_what_ends_a_run_at_once_is_named_too(folder):
    batches = pipeline.train_batches(folder(3, damaged=[1]), **CROP, batch_size=3, seed=0, max_unreadable=0)
    with contextlib.closing(batches), pytest.raises(InputError, match="1 of 3 pictures are unreadable, and 0 may be"):
        next(batches)
    assert list(batches.skipped) == ["class1/001.png"]


@pytest.mark.parametrize("num_workers", [0, *slow(2)])
def test_files_of_every_odd_kind_are_converted_or_skipped(tmp_path, monkeypatch, num_workers):
    """Once each among enough others, in a whole epoch; the class of a file is its name.

    Some come once more in the place of an unreadable one before them.
    """
    messages = []
    monkeypatch.setattr(pipeline.logging, "warning", lambda text, *args: messages.append(text % args))
    readable, unreadable = odd_pictures.readable(), odd_pictures.unreadable()
    for name, content in (readable | unreadable | {"plain.png": odd_pictures.plain()}).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(content)
    (tmp_path / "vanishes").mkdir()
    (tmp_path / "vanishes/vanishes.png").touch()
    missing = 2000 - len(readable) - len(unreadable) - 2
    for index in range(missing):
        (tmp_path / f"plain.png/{index}.png").hardlink_to(tmp_path / "plain.png/plain.png")
    source = FolderSource(tmp_path)
    (tmp_path / "vanishes/vanishes.png").unlink()
    options = {"image_size": 16, "resize_min": 16, "resize_max": 20, "num_workers": num_workers, "max_unreadable": 0.02}
    batches = pipeline.train_batches(source, **CROP | options, batch_size=100, seed=0)
    with contextlib.closing(batches):
        epoch = list(itertools.islice(batches, 20))
    images, labels = (np.concatenate([batch[name] for batch in epoch]) for name in ("image", "label"))
    assert images.shape == (2000, 16, 16, 3)
    for name in readable:
        crops = images[labels == source.classes.index(name)]
        assert len(crops) >= 1
        colour = odd_pictures.COLOURS.get(name, odd_pictures.GREY)
        np.testing.assert_allclose(crops, np.broadcast_to(colour, crops.shape), atol=2)
    expected = [f"{name}/{name}" for name in (*unreadable, "vanishes.png")]
    expected[-1] = "vanishes/vanishes.png"
    assert batches.skipped == dict.fromkeys(expected, 1)
    assert len(messages) == len(expected)
    for path in (str(tmp_path / name) for name in expected):
        (message,) = (message for message in messages if path in message)
        assert len(message) > len(f"skipped {path!r}: ")
    (bomb,) = (message for message in messages if "small_bomb.png" in message)
    assert "limit of 89" in bomb  # in Pillow's words where warnings are errors, as here


def test_training_decodes_no_larger_than_it_needs_and_evaluation_whole(tmp_path, monkeypatch):
    """Noise, of which the halves made by the decoder differ from those by the box filter."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=90)
    source, content, seen = FolderSource(tmp_path), (tmp_path / "a.jpg").read_bytes(), []
    opened = pipeline.open_stored

    def spy(data, min_side=0):
        image = opened(data, min_side)
        if data == content:  # a thread of an earlier test may still read ahead
            seen.append((min_side, image.size))
        return image

    monkeypatch.setattr(pipeline, "open_stored", spy)
    take(1, source, batch_size=1, resize_min=8, resize_max=16)
    assert set(seen) == {(16, (16, 16))}
    take(1, source, batch_size=1)
    list(pipeline.eval_batches(source, image_size=SIZE, batch_size=1))
    assert set(seen) == {(16, (16, 16)), (0, (64, 64))}


def test_evaluation_sees_everything_once_in_order_and_masks_the_rest(folder):
    source = folder(10, size=(SIZE, SIZE))
    batches = list(pipeline.eval_batches(source, image_size=SIZE, batch_size=4))
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    images = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(images, np.stack([decode_image(source[index]["image"]) for index in range(10)]))
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert all(batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32 for batch in batches)


@pytest.mark.parametrize("process_count", [4, *slow(2)])
def test_hosts_evaluate_the_same_number_of_batches_and_the_same_rows(folder, process_count):
    source = folder(9)
    parts = [
        list(
            pipeline.eval_batches(
                source, image_size=SIZE, batch_size=4, process_index=index, process_count=process_count
            )
        )
        for index in range(process_count)
    ]
    assert {len(part) for part in parts} == {3}
    assert_same(join_hosts(parts), list(pipeline.eval_batches(source, image_size=SIZE, batch_size=4)))


def test_evaluation_in_worker_processes_is_the_same_and_ends(folder):
    source = folder(10)
    expected = list(pipeline.eval_batches(source, image_size=SIZE, batch_size=4))
    assert_same(list(pipeline.eval_batches(source, image_size=SIZE, batch_size=4, num_workers=2)), expected)


def test_evaluation_crops_the_centre_of_the_resized_picture(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (batch,) = pipeline.eval_batches(FolderSource(tmp_path), image_size=16, batch_size=1)
    assert (batch["image"] == 255).all()


def test_evaluation_crops_as_it_is_told(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (batch,) = pipeline.eval_batches(FolderSource(tmp_path), image_size=8, batch_size=1, crop=center_no_resize)
    np.testing.assert_array_equal(batch["image"][0], pixels[4:12, 20:28])


def test_a_damaged_file_is_masked_in_evaluation(folder):
    source = folder(100, damaged=[8], size=(SIZE, SIZE))
    batches = pipeline.eval_batches(source, image_size=SIZE, batch_size=10)
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert np.flatnonzero(~mask).tolist() == [4]
    assert list(batches.skipped.values()) == [1]
    with pytest.raises(InputError, match="1 of 50 pictures"):
        list(pipeline.eval_batches(Sample(source, 50), image_size=SIZE, batch_size=10, max_unreadable=0))


def test_a_worker_that_dies_ends_the_run(photos):
    with contextlib.closing(pipeline.train_batches(photos, **CROP, batch_size=4, seed=0, num_workers=1)) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="terminated unexpectedly"):
            list(itertools.islice(batches, 20))


def test_workers_outlast_the_signals_of_a_scheduler(photos):
    expected = take(10, photos, batch_size=4)
    with contextlib.closing(pipeline.train_batches(photos, **CROP, batch_size=4, seed=0, num_workers=1)) as batches:
        received = [next(batches)]
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        received += itertools.islice(batches, 9)
    assert_same(received, expected)
    worker.join(timeout=60)
    assert worker.exitcode == 0


LOADER = """
import time
from absl import app
from fvq_jax.data import pipeline, sources

def main(_):
    source = sources.PhotoSource(8, "train")
    options = dict(image_size=8, resize_min=0, resize_max=0, flip=True, batch_size=2, seed=0, num_workers=1)
    batches = pipeline.train_batches(source, **options)
    next(batches)
    print("ready", flush=True)
    time.sleep({pause})

if __name__ == "__main__":
    app.run(main)
"""


@pytest.mark.parametrize("killed", [True, *slow(False)])
def test_no_worker_is_left_behind(tmp_path, killed):
    script = tmp_path / "loader.py"
    script.write_text(LOADER.format(pause=600 if killed else 0))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        if killed:
            process.kill()
        # The pipes reach their end when the last process that writes to them is gone, workers included.
        _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if killed else 0)
    assert killed or errors == ""


@pytest.mark.parametrize(("size", "small"), [((12, 10), [False, False]), ((12, 7), [True, True])])
def test_pictures_smaller_than_the_crop_are_marked_in_evaluation(folder, size, small):
    (batch,) = pipeline.eval_batches(folder(2, size=size), image_size=SIZE, batch_size=2)
    assert batch["small"].tolist() == small
    crops = RandomCrops(folder(2, size=size), 2, SIZE)
    (batch,) = pipeline.eval_batches(crops, image_size=SIZE, batch_size=2)
    assert batch["small"].tolist() == small
