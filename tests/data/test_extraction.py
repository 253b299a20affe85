import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data import extraction, shards
from fvq_jax.data.array_record import ArrayRecordSource
from fvq_jax.data.codes import open_codes
from fvq_jax.data.croppings import Cropping
from fvq_jax.data.decode import open_image
from fvq_jax.data.extraction import Work, extract
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.journal import JOURNAL
from fvq_jax.data.photos import PhotoSource
from fvq_jax.runtime.errors import DataError, InputError
from fvq_jax.runtime.interrupt import Interrupt
from tests.data.test_prepare import run as prepare
from tests.helpers.code_folders import pixel_encoder
from tests.helpers.hanging_source import HangingSource
from tests.helpers.pictures import damage, write_pictures
from tests.helpers.two_hosts import on_two_hosts

NAMES = [f"class{number % 3}/{number:02}.png" for number in range(23)]
SIZE, SHARD = 8, 5
SHARDS = [f"codes-{number:05}-of-00005.array_record" for number in range(5)]
TEN = Cropping.parse("ten", "1.2,1.5", SIZE)
# Longer than any step below takes, and only there so that a failure does not hang.
PATIENCE = 300


def run(source, out, cropping=TEN, encoder=None, interrupt=None, **work):
    return extract(
        source,
        cropping,
        encoder or pixel_encoder(SIZE),
        out,
        Work(**{"batch": 40, "shard_size": SHARD} | work),
        interrupt or Interrupt(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    write_pictures(path, NAMES)
    return path


@pytest.fixture(scope="module")
def extracted(folder, tmp_path_factory):
    """A whole run, whose bytes every other one must give."""
    out = tmp_path_factory.mktemp("extracted") / "out"
    run(FolderSource(folder), out)
    return out


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def refusal(source, out, **options):
    with pytest.raises(InputError) as caught:
        run(source, out, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_codes_labels_and_names_of_every_picture(folder, extracted):
    source, codes, encoder = FolderSource(folder), open_codes(extracted), pixel_encoder(SIZE)
    assert len(codes) == len(NAMES)
    for index in range(len(NAMES)):
        crops = TEN.cut(open_image(source.name(index)), index)
        labels = np.full(20, source.label(index))
        expected = encoder.encode(crops.reshape(-1, SIZE, SIZE, 3), labels).reshape(2, 10, 4, 4)
        record = codes[index]
        np.testing.assert_array_equal(record["codes"], expected)
        assert record["label"] == source.label(index)
        assert codes.relative_name(index) == source.relative_name(index)


def test_the_manifest_says_what_the_codes_are(folder, extracted):
    content = json.loads((extracted / "manifest.json").read_text())
    assert content["tokenizer"] == "fedcba9876543210"
    assert content["tokenizer_path"] == "/somewhere"
    assert content["pictures"] == FolderSource(folder).fingerprint()
    assert (content["vocab"], content["dtype"], content["grid"]) == (700, "<u2", [4, 4])
    assert (content["cropping"], content["crops"], content["scales"], content["size"]) == ("ten", 10, [1.2, 1.5], 8)
    assert (content["classes"], content["class_names"]) == (3, ["class0", "class1", "class2"])
    assert content["condition"] == "none"
    assert content["records"] == len(NAMES)
    assert set(files(extracted)) == {"manifest.json", *SHARDS}
    for shard in content["shards"]:
        data = (extracted / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    info = open_codes(extracted).info
    assert info.class_names == ("class0", "class1", "class2")


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 10**9}, {"workers": 2}])
def test_batches_and_workers_change_nothing(folder, extracted, tmp_path, options):
    run(FolderSource(folder), tmp_path / "out", **options)
    assert files(tmp_path / "out") == files(extracted)


def test_crops_of_a_picture_go_together_and_batches_keep_one_size(folder, tmp_path):
    """One compiled program is enough: the last batch of a shard is filled up."""
    encoder, seen = pixel_encoder(SIZE), []

    def encode(images, labels):
        seen.append((images.shape, labels.shape, images.dtype, labels.dtype))
        return encoder.encode(images, labels)

    run(FolderSource(folder), tmp_path / "out", encoder=dataclasses.replace(encoder, encode=encode), batch=45)
    assert set(seen) == {((40, SIZE, SIZE, 3), (40,), np.dtype(np.uint8), np.dtype(np.int32))}
    assert len(seen) == 4 * 3 + 2  # two pictures at a time: three batches for five, two for the last three


def test_other_croppings(folder, tmp_path):
    source = FolderSource(folder)
    centre = Cropping.parse("center", None, SIZE)
    run(source, tmp_path / "centre", centre)
    record = open_codes(tmp_path / "centre")[3]
    crop = centre.cut(open_image(source.name(3)), 3)[0]
    np.testing.assert_array_equal(record["codes"][0], pixel_encoder(SIZE).encode(crop, np.array([source.label(3)])))
    random = Cropping.parse("random:3", None, SIZE, 5)
    run(source, tmp_path / "random", random)
    assert open_codes(tmp_path / "random").info.scales == (None,)
    assert open_codes(tmp_path / "random")[3]["codes"].shape == (1, 3, 4, 4)
    assert "was begun with --seed 5, not 6" in refusal(
        source, tmp_path / "random", cropping=Cropping.parse("random:3", None, SIZE, 6)
    )


def test_photographs_have_a_class_each(tmp_path):
    source = PhotoSource(SIZE, "eval", 40)
    run(source, tmp_path / "out", Cropping.parse("center", None, SIZE))
    codes = open_codes(tmp_path / "out")
    assert len(codes) == 40
    assert codes.info.classes == len(codes.info.class_names) == 10
    assert codes.info.class_names[:2] == ("astronaut", "chelsea")
    assert codes.relative_name(1) == "chelsea.png"
    assert codes[1]["label"] == 1


def test_two_processes_write_the_folder_of_one(folder, extracted, tmp_path, monkeypatch):
    out, written = tmp_path / "out", {0: [], 1: []}
    enter = shards.ShardWriter.__enter__

    def note(writer):
        written[extraction.jax.process_index()].append(writer._path.name)
        return enter(writer)

    monkeypatch.setattr(shards.ShardWriter, "__enter__", note)
    messages = on_two_hosts(monkeypatch, lambda index: run(FolderSource(folder), out))
    assert written == {0: SHARDS[::2], 1: SHARDS[1::2]}
    assert files(out) == files(extracted)
    assert messages[0] == messages[1]
    assert "23 pictures of 3 classes, each 2 x 10 crops of 4 x 4 codes, in 5 shards" in messages[0]


def test_an_error_in_one_process_ends_both_and_the_rest_goes_on_later(folder, extracted, tmp_path, monkeypatch):
    """The second process fails in its second shard, and its first is taken over by a single process."""
    out, encoder = tmp_path / "out", pixel_encoder(SIZE)

    def work(index):
        calls = []

        def encode(images, labels):
            calls.append(len(images))
            if index == 1 and len(calls) == 4:
                raise InputError("the label 7 is too much")
            return encoder.encode(images, labels)

        with pytest.raises(InputError, match=r"^process 1: the label 7 is too much$"):
            run(FolderSource(folder), out, encoder=dataclasses.replace(encoder, encode=encode))

    on_two_hosts(monkeypatch, work)
    assert not (out / "manifest.json").exists()
    assert {path.name for path in out.glob("unfinished*")} == {JOURNAL, "unfinished-00001.jsonl"}
    (out / "unfinished-00001.jsonl").write_bytes((out / "unfinished-00001.jsonl").read_bytes() + b'{"file": "co')
    first = {name: (out / name).stat().st_mtime_ns for name in SHARDS[:3]}
    assert "2 shards written now" in run(FolderSource(folder), out)
    assert {name: (out / name).stat().st_mtime_ns for name in SHARDS[:3]} == first
    assert files(out) == files(extracted)


def test_processes_that_see_other_pictures_are_told(folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    write_pictures(other, NAMES[:4])

    def work(index):
        with pytest.raises(InputError, match="process 1 differs from process 0: pictures is 4 files"):
            run(FolderSource(other if index else folder), tmp_path / "out")

    on_two_hosts(monkeypatch, work)
    assert not (tmp_path / "out").exists()


SLOW = f"""
import sys, time
from fvq_jax.data import extraction
from fvq_jax.data.croppings import Cropping
from fvq_jax.data.folder import FolderSource
from fvq_jax.runtime.interrupt import Interrupt
from tests.helpers.code_folders import pixel_encoder
import fvq_jax.data.shards as shards

leave = shards.ShardWriter.write
def wait(writer, record):
    while "00002-of" in writer._path.name and interrupt.signal is None:
        time.sleep(0.01)
    leave(writer, record)
shards.ShardWriter.write = wait

if __name__ == "__main__":
    work = extraction.Work(batch=40, shard_size={SHARD})
    with Interrupt() as interrupt:
        source, cropping = FolderSource(sys.argv[1]), Cropping.parse("ten", "1.2,1.5", {SIZE})
        said = extraction.extract(source, cropping, pixel_encoder({SIZE}), __import__("pathlib").Path(sys.argv[2]),
                                  work, interrupt)
    sys.exit(0 if said else 75)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_started_again_it_gives_the_same_bytes(folder, extracted, tmp_path, number):
    """The program waits in the middle of the third shard until the signal has come."""
    out, program = tmp_path / "out", tmp_path / "slow.py"
    program.write_text(SLOW)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, program, folder, out], stderr=subprocess.PIPE, env=environment)
    end = time.monotonic() + PATIENCE
    while not list(out.glob("*00002-of*.unfinished")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), errors
    assert bool(list(out.glob("*.unfinished"))) == (number == signal.SIGKILL)
    with pytest.raises(InputError, match=r"extracting did not finish, run python -m fvq_jax\.tokenize extract"):
        open_codes(out)
    first = (out / SHARDS[0]).stat().st_mtime_ns
    (out / SHARDS[3]).write_bytes(b"never noted")
    assert "3 shards written now" in run(FolderSource(folder), out)
    assert files(out) == files(extracted)
    assert (out / SHARDS[0]).stat().st_mtime_ns == first


def test_what_is_done_is_done_once(folder, extracted):
    before = {path: path.stat().st_mtime_ns for path in extracted.iterdir()}
    assert "0 shards written now" in run(FolderSource(folder), extracted, encoder=pixel_encoder(SIZE))
    assert {path: path.stat().st_mtime_ns for path in extracted.iterdir()} == before


def test_a_signal_before_the_first_shard(folder, tmp_path):
    interrupt = Interrupt()
    interrupt.signal = signal.SIGTERM
    assert run(FolderSource(folder), tmp_path / "out", interrupt=interrupt) == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {JOURNAL}


@pytest.mark.parametrize("kind", ["shorter", "gone", "changed"])
def test_a_damaged_shard_is_named_and_written_again(folder, extracted, tmp_path, capsys, kind):
    """One of the right size is found by its checksum, on demand."""
    out = tmp_path / "out"
    shutil.copytree(extracted, out)
    content = (out / SHARDS[2]).read_bytes()
    if kind == "gone":
        (out / SHARDS[2]).unlink()
    else:
        (out / SHARDS[2]).write_bytes(content[:-1] + (b"" if kind == "shorter" else bytes([content[-1] ^ 1])))
    if kind == "changed":
        run(FolderSource(folder), out)
        assert files(out) != files(extracted)
    run(FolderSource(folder), out, verify=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fvq_jax: ")]
    assert SHARDS[2] in line
    assert line.endswith(": it is written again")
    assert files(out) == files(extracted)


def test_another_tokenizer_or_way_is_refused(folder, extracted, tmp_path):
    source, before = FolderSource(folder), files(extracted)
    other = pixel_encoder(SIZE, fingerprint="0000000000000000")
    assert "was begun with the tokenizer fedcba9876543210, not 0000000000000000" in refusal(
        source, extracted, encoder=other
    )
    assert "was begun with --shard-size 5, not 6" in refusal(source, extracted, shard_size=6)
    assert "was begun with --crops ten, not center" in refusal(
        source, extracted, cropping=Cropping.parse("center", None, SIZE)
    )
    assert "was begun with --scales [1.2, 1.5], not [1.2]" in refusal(
        source, extracted, cropping=Cropping.parse("ten", "1.2", SIZE)
    )
    labelled = pixel_encoder(SIZE, condition="label")
    assert "was begun with --condition none, not label" in refusal(source, extracted, encoder=labelled)
    write_pictures(tmp_path, NAMES[:5])
    assert "the pictures are not those" in refusal(FolderSource(tmp_path), extracted)
    moved = pixel_encoder(SIZE, path="/elsewhere")
    assert "0 shards written now" in run(source, extracted, encoder=moved)
    assert files(extracted) == before


def test_bad_input_is_refused(folder, tmp_path):
    source, out = FolderSource(folder), tmp_path / "out"
    for name in ("batch", "shard_size"):
        assert "--batch and --shard-size must be at least 1" in refusal(source, out, **{name: 0})
    assert "--workers and --timeout must be at least 0" in refusal(source, out, workers=-1)
    assert not out.exists()
    assert "holds something else" in refusal(source, folder)
    (tmp_path / "file").touch()
    assert "cannot write to" in refusal(source, tmp_path / "file")
    out.mkdir()
    with open(out / JOURNAL, "wb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert f"another process is extracting {out}" in refusal(source, out)


def test_a_full_disk_is_bad_input_and_what_is_written_stays(folder, extracted, tmp_path, monkeypatch):
    out, opened, writer = tmp_path / "out", [], shards.ArrayRecordWriter

    def full(path, options):
        opened.append(path)
        return writer("/dev/full" if len(opened) == 3 else path, options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "ArrayRecordWriter", full)
        line = refusal(FolderSource(folder), out)
    assert f"cannot write {out / SHARDS[2]}" in line
    assert "No space left" in line
    assert "3 shards written now" in run(FolderSource(folder), out)
    assert files(out) == files(extracted)


def test_unreadable_pictures_are_named_left_out_and_counted(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    paths = write_pictures(pictures, NAMES)
    damage(paths[4])
    (pictures / "class1" / "99.png").symlink_to("nothing")
    source = FolderSource(pictures)
    assert "22 pictures of 3 classes" in run(source, tmp_path / "out")
    errors = capsys.readouterr().err
    assert f"fvq_jax: left out {NAMES[4]!r}: image file is truncated" in errors
    assert "fvq_jax: left out 'class1/99.png': No such file or directory" in errors
    codes = open_codes(tmp_path / "out")
    kept = [source.relative_name(index) for index in range(len(source))]
    kept = [name for name in kept if name not in (NAMES[4], "class1/99.png")]
    assert [codes.relative_name(index) for index in range(len(codes))] == kept
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(len(shard["left_out"]) for shard in content["shards"]) == 2
    assert "2 left out, 0 shards written now" in run(source, tmp_path / "out")
    for path in paths:
        path.write_bytes(b"")
    assert "none of the pictures (24 files" in refusal(FolderSource(pictures), tmp_path / "nothing")


def test_prepared_pictures_give_the_codes_of_their_folder(folder, extracted, tmp_path, capsys):
    assert prepare(folder, tmp_path / "prepared") == 0
    source = ArrayRecordSource(tmp_path / "prepared")
    run(source, tmp_path / "out")
    assert {name: files(tmp_path / "out")[name] for name in SHARDS} == {name: files(extracted)[name] for name in SHARDS}
    shard = tmp_path / "prepared" / "pictures-00000-of-00001.array_record"
    content, picture = bytearray(shard.read_bytes()), FolderSource(folder)[7]["image"]
    content[content.index(picture) + len(picture) // 2] ^= 255
    shard.write_bytes(content)
    assert "22 pictures" in run(source, tmp_path / "damaged")
    assert "record 7: damaged record" in capsys.readouterr().err


def test_pictures_that_stop_coming_end_it(folder, tmp_path):
    source = HangingSource(FolderSource(folder), 22)
    with pytest.raises(DataError, match="no batch for 2 s"):
        run(source, tmp_path / "out", timeout=2.0)
    source.release()
    assert (tmp_path / "out" / SHARDS[0]).exists()


def test_memory_does_not_grow_with_the_pictures(tmp_path):
    """One picture under many names, so that only what is kept per picture could add up."""
    cropping, peaks = Cropping.parse("ten", None, 32), []
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    for count in (16, 160):
        (tmp_path / str(count)).mkdir()
        for index in range(count):
            (tmp_path / str(count) / f"{index}.png").symlink_to(tmp_path / "a.png")
        source = FolderSource(tmp_path / str(count))
        tracemalloc.start()
        run(source, tmp_path / f"out{count}", cropping, pixel_encoder(32), shard_size=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 144 * 20 * 3072 / 4, peaks  # the crops of 144 pictures are four times as much
