"""Files with random damage, and random command lines: every reader takes them, or refuses them in one line.

RANDOM_INPUTS=N tries N of each kind (120): `RANDOM_INPUTS=2000 python -m pytest -n 0 tests/test_random_input.py`.
"""

import contextlib
import datetime
import io
import os
import pathlib
import warnings

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvq_jax import convert, evaluate, sample, tokenize
from fvq_jax.data import array_record, prepare
from fvq_jax.data.array_record import ArrayRecordSource
from fvq_jax.data.codes import open_codes
from fvq_jax.data.decode import UnreadableImageError, decode_image
from fvq_jax.data.npz_rows import CodeReader, CodeWriter, ImageReader, ImageWriter
from fvq_jax.data.shards import Manifest, ShardWriter
from fvq_jax.evals.reference import read_statistics
from fvq_jax.inference.saved import load, save_folder
from fvq_jax.interop.torch_file import read_tensors
from fvq_jax.runtime.errors import InputError
from tests.helpers.code_folders import write_codes
from tests.helpers.random_tokenizer import random_tokenizer

COUNT = int(os.environ.get("RANDOM_INPUTS", "120"))
RNG = np.random.default_rng(0)
TENSORS = {
    "encoder.weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "step": np.array(3),
    "codes.half": RNG.normal(size=5).astype(np.float16),
}
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "cut", "drop", "insert", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=4,
)


def tried(count=COUNT):
    """`count` examples, the same in every run."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def damaged(content, edits):
    """The bytes with changes at places given as parts of their length."""
    content = bytearray(content)
    for kind, place, value, length in edits:
        at = int(place * len(content))
        if kind == "set" and content:
            content[at] = value
        elif kind == "flip" and content:
            content[at] ^= 1 << value % 8
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "insert":
            content[at:at] = bytes([value]) * length
        else:
            content[at:at] = content[at : at + length]
    return bytes(content)


def torch_bytes(zipped):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    tensors = {name: torch.as_tensor(value) for name, value in TENSORS.items()}
    others = [np.float64(1.5), datetime.date(2024, 1, 2), pathlib.PurePosixPath("a/b"), torch.float16, {"a"}]
    checkpoint = {"others": others, "model": tensors, "args": {"codebook_l2_norm": True}, "epoch": 3}
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def write_code_file(path):
    with CodeWriter(path, (2, 3)) as writer:
        writer.write(np.arange(30, dtype=np.int32).reshape(5, 2, 3), [f"{i}.png" for i in range(5)])


def write_image_file(path):
    with ImageWriter(path, 4, 4, labels=np.arange(3)) as writer:
        writer.write(RNG.integers(0, 256, (3, 4, 4, 3), np.uint8))


def write_llamagen_codes(folder):
    for kind, value in (("codes", RNG.integers(0, 9, (1, 10, 16))), ("labels", np.zeros(1, np.int64))):
        (folder / f"imagenet16_{kind}").mkdir(parents=True)
        np.save(folder / f"imagenet16_{kind}" / "0.npy", value)


def write_prepared(folder):
    folder.mkdir()
    with ShardWriter(folder / "shard-00000.array_record") as writer:
        for number in range(3):
            writer.write(array_record.pack(picture("PNG"), number, f"{number}.png"))
    plan = {"format": array_record.PICTURES.format, "classes": ["a", "b", "c"]}
    Manifest(plan, (writer.shard,)).write(folder)


def picture(kind):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(buffer, kind)
    return buffer.getvalue()


def read_every(reader):
    for size in (1, 1000):
        for _ in reader.batches(size):
            pass


def touch(tensors):
    """Reads the first and the last value: a tensor that reaches beyond the file ends the process here."""
    for value in tensors.values():
        if value.size:
            _ = value.flat[0], value.flat[value.size - 1]


def read_prepared(folder):
    source = ArrayRecordSource(folder)
    for index in range(len(source)):
        with contextlib.suppress(UnreadableImageError):  # which is counted, and the next picture is taken
            decode_image(source[index]["image"])


def read_codes(folder):
    source = open_codes(folder)
    for index in range(len(source)):
        _ = source[index]


def taken_or_refused(read, *arguments):
    """An InputError must be one line; warnings are for the user, and no error."""
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(*arguments)
        except InputError as error:
            message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_checkpoint_files(kind, tmp_path):
    whole = safetensors.numpy.save(TENSORS) if kind == "safetensors" else torch_bytes(kind == "zip")
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    path.write_bytes(whole)
    touch(read_tensors(path))

    @tried()
    @given(EDITS)
    def attempt(edits):
        path.write_bytes(damaged(whole, edits))
        taken_or_refused(lambda: touch(read_tensors(path)))

    attempt()


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_code_file, lambda path: read_every(CodeReader(path))),
        (write_image_file, lambda path: read_every(ImageReader(path))),
        (write_image_file, read_statistics),
    ],
    ids=["codes", "images", "statistics"],
)
def test_npz_files(write, read, tmp_path):
    path = tmp_path / "x.npz"
    write(path)
    read(path)
    whole = path.read_bytes()

    @tried()
    @given(EDITS)
    def attempt(edits):
        path.write_bytes(damaged(whole, edits))
        taken_or_refused(read, path)

    attempt()


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_prepared, read_prepared),
        (
            lambda folder: write_codes(folder, RNG.integers(0, 512, (3, 1, 1, 4, 4)), [0, 1, 2], cropping="center"),
            read_codes,
        ),
        (write_llamagen_codes, read_codes),
    ],
    ids=["pictures", "codes", "llamagen"],
)
def test_folders_of_records(write, read, tmp_path):
    folder = tmp_path / "records"
    write(folder)
    read(folder)
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    @tried()
    @given(st.sampled_from(list(files)), EDITS)
    def attempt(path, edits):
        path.write_bytes(damaged(files[path], edits))
        taken_or_refused(read, folder)
        path.write_bytes(files[path])

    attempt()


def test_a_saved_tokenizer(tmp_path):
    saved = random_tokenizer(bridge="none", ch_mult=(1,))
    save_folder(tmp_path / "saved", saved)
    config = tmp_path / "saved" / "config.json"
    load(tmp_path / "saved")
    whole = config.read_bytes()

    @tried(max(1, COUNT // 10))  # each builds a network
    @given(EDITS)
    def attempt(edits):
        config.write_bytes(damaged(whole, edits))
        taken_or_refused(load, tmp_path / "saved")

    attempt()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_pictures(kind):
    whole = picture(kind)
    decode_image(whole)

    @tried()
    @given(EDITS)
    def attempt(edits):
        with warnings.catch_warnings(), contextlib.suppress(UnreadableImageError):
            warnings.simplefilter("ignore")
            decode_image(damaged(whole, edits))

    attempt()


NAMES = """
    workdir tokenizer generator samples data out size batch crops scales layout condition seed guidance top_k top_p
    temperature classes per_class compare inception lpips_path split workers l2_norm heads protocol images report steps
    step distributed shard_size
"""
OPTIONS = [f"--{name}" for name in NAMES.split()]
COMMANDS = ("encode", "decode", "extract", "jax", "llamagen")
WORDS = st.one_of(
    st.sampled_from([*OPTIONS, *COMMANDS, "/nowhere", "0", "-1", "1e999", "nan", "1,2", "null", "", " ", "--", "-"]),
    st.tuples(st.sampled_from(OPTIONS), st.text(max_size=8)).map("=".join),
    st.text(max_size=8),
)


@pytest.mark.parametrize("program", [convert, evaluate, tokenize, sample, prepare], ids=lambda module: module.__name__)
def test_command_lines(program, tmp_path, monkeypatch):
    """Nothing there is a tokenizer, so that no line can do more than be refused, or show the help."""
    monkeypatch.chdir(tmp_path)

    @tried()
    @given(st.lists(WORDS, max_size=6))
    def attempt(words):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = program.main(words)
            except SystemExit as end:  # of argparse
                code = end.code
        assert code == 2 or (code == 0 and any(word.startswith("-h") or word.startswith("--h") for word in words)), (
            words
        )
        assert "Traceback" not in err.getvalue()
        if code:
            assert len(err.getvalue().strip().splitlines()) == 1, (words, err.getvalue())

    attempt()
