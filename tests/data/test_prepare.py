import concurrent.futures
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from fvq_jax.data import prepare, shards
from fvq_jax.data.array_record import ArrayRecordSource
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.journal import JOURNAL
from fvq_jax.runtime.errors import InputError
from tests.helpers.pictures import damage, write_pictures
from tests.helpers.slow_cases import slow

NAMES = [f"class{number % 3}/{number:03}.png" for number in range(300)]
SHARDS = [f"pictures-{number:05}-of-00006.array_record" for number in range(6)]
# Longer than any step below takes, and only there so that a failure does not hang.
PATIENCE = 300


class InProcess:
    """Stands for the pool: to start a process takes longer than all of its work here, and most tests need none."""

    def __init__(self, workers, context, initializer, initargs):
        initializer(*initargs)

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        assert cancel_futures


def run(folder, out, *options):
    """The exit code of the program, its work done in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "ProcessPoolExecutor", InProcess)
        patch.setattr(prepare, "follow_parent", lambda: None)
        return prepare.main([str(folder), str(out), "--shard-size=50", *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    write_pictures(path, NAMES)
    return path


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """A whole run, whose bytes every other one must give."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert run(folder, out) == 0
    return out


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def unfinished(out):
    return list(out.glob("*.unfinished"))


def wait_for(condition, process):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def refusal(capsys, *args):
    """The line with which the program refuses these arguments; what is left of a progress bar may precede it."""
    assert run(*args) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_manifest_and_shards(folder, prepared):
    content = json.loads((prepared / "manifest.json").read_text())
    assert content["records"] == 300
    assert content["classes"] == ["class0", "class1", "class2"]
    assert content["pictures"] == FolderSource(folder).fingerprint()
    assert set(files(prepared)) == {"manifest.json"} | {shard["file"] for shard in content["shards"]}
    assert [shard["records"] for shard in content["shards"]] == [50] * 6
    for shard in content["shards"]:
        data = (prepared / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()


def test_the_program_in_several_processes_gives_the_same_bytes(folder, prepared, tmp_path):
    command = [sys.executable, "-m", "fvq_jax.data.prepare", folder, tmp_path / "out", "--shard-size=50", "--workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/out: 300 pictures of 3 classes in 6 shards")
    assert "300/300" in done.stderr
    assert files(tmp_path / "out") == files(prepared)


SLOW = """
import sys, time
from fvq_jax.data import prepare
from tests.helpers.slow_cases import slow
read = prepare._read_picture
def wait(index):
    while index == 60 and not prepare._worker.stop.is_set():
        time.sleep(0.01)
    return read(index)
prepare._read_picture = wait
if __name__ == "__main__":
    sys.exit(prepare.main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, *slow(signal.SIGTERM)])
def test_stopped_and_started_again_it_gives_the_same_bytes(folder, prepared, tmp_path, number):
    """The program waits in the middle of the second shard until the signal has come."""
    out, program = tmp_path / "out", tmp_path / "slow.py"
    program.write_text(SLOW)
    command = [sys.executable, program, folder, out, "--shard-size=50", "--workers=1"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(prepare.__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    journal = out / JOURNAL
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") == 2 and unfinished(out), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    if number == signal.SIGTERM:
        assert process.returncode == 75
        assert errors.splitlines()[-1] == "fvq_jax: interrupted by SIGTERM: start me again"
        assert not unfinished(out)
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    with pytest.raises(InputError, match=r"preparing did not finish, run python -m fvq_jax\.data\.prepare"):
        ArrayRecordSource(out)
    first = (out / SHARDS[0]).stat().st_mtime_ns
    # What a kill at other moments leaves: half a line, a shard without its line, half a shard.
    journal.write_bytes(journal.read_bytes() + b'{"file": "pict')
    (out / SHARDS[3]).write_bytes(b"never noted")
    (out / f"{SHARDS[4]}.123.unfinished").write_bytes(b"half")
    assert run(folder, out) == 0
    assert files(out) == files(prepared)
    assert (out / SHARDS[0]).stat().st_mtime_ns == first


def test_what_is_done_is_done_once(folder, prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert run(folder, prepared) == 0
    assert "6 shards, 0.00 GB, 0 left out, 0 shards written now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@pytest.mark.parametrize("kind", ["shorter", "gone", "changed"])
def test_a_damaged_shard_is_written_again(folder, prepared, tmp_path, capsys, kind):
    """One of the right size is found by its checksum, on demand."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    content = (out / SHARDS[2]).read_bytes()
    if kind == "gone":
        (out / SHARDS[2]).unlink()
    else:
        (out / SHARDS[2]).write_bytes(content[:-1] + (b"" if kind == "shorter" else bytes([content[-1] ^ 1])))
    if kind == "changed":
        assert run(folder, out) == 0
        assert files(out) != files(prepared)
        capsys.readouterr()
    assert run(folder, out, "--verify") == 0
    said = capsys.readouterr()
    assert "as their checksums say" in said.out
    assert f"{SHARDS[2]}" in said.err.splitlines()[0]
    assert files(out) == files(prepared)


def test_another_folder_or_way_is_refused(folder, prepared, tmp_path, capsys):
    before = files(prepared)
    assert "was begun with --shard-size 50, not 60" in refusal(capsys, folder, prepared, "--shard-size=60")
    assert "was begun with --check False, not True" in refusal(capsys, folder, prepared, "--check")
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / NAMES[7]).write_bytes((changed / NAMES[7]).read_bytes() + b"x")
    assert "the pictures are not those" in refusal(capsys, changed, prepared)
    assert files(prepared) == before


def test_bad_input_is_refused(folder, tmp_path, capsys, monkeypatch):
    assert "nowhere' does not exist" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "must be above 0" in refusal(capsys, folder, tmp_path / "out", "--workers=0")
    assert "must be above 0" in refusal(capsys, folder, tmp_path / "out", "--shard-size=0")
    assert "holds something else" in refusal(capsys, folder, folder)
    (tmp_path / "file").touch()
    assert "cannot write to" in refusal(capsys, folder, tmp_path / "file")
    with pytest.raises(SystemExit) as caught:
        run(folder, tmp_path / "out", "--sharding")
    assert caught.value.code == 2
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / JOURNAL, "wb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert "another process is preparing" in refusal(capsys, folder, tmp_path / "out")


def test_a_full_disk_is_bad_input_and_what_is_written_stays(folder, prepared, tmp_path, capsys, monkeypatch):
    out, opened = tmp_path / "out", []

    def writer(path, options):
        opened.append(path)
        return ArrayRecordWriter("/dev/full" if len(opened) == 3 else path, options)

    monkeypatch.setattr(shards, "ArrayRecordWriter", writer)
    line = refusal(capsys, folder, out)
    assert f"cannot write {out / SHARDS[2]}" in line
    assert "No space left" in line
    assert run(folder, out) == 0
    assert files(out) == files(prepared)


@pytest.mark.parametrize("name", [JOURNAL, "manifest.json"])
def test_so_it_is_when_the_disk_has_no_room_for_journal_or_manifest(
    name, folder, prepared, tmp_path, capsys, monkeypatch
):
    out, fsync = tmp_path / "out", os.fsync

    def full(file):
        if name in os.readlink(f"/proc/self/fd/{file}") and any(out.glob("*.array_record")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert f"cannot write {out / name}: No space left" in refusal(capsys, folder, out)
    assert run(folder, out) == 0
    assert files(out) == files(prepared)


def test_a_line_of_the_journal_for_which_half_the_room_is_left(folder, prepared, tmp_path, capsys):
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        line = refusal(capsys, folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {out / JOURNAL}: File too large" in line
    assert (out / JOURNAL).stat().st_size == 64
    assert run(folder, out) == 0
    assert files(out) == files(prepared)


def test_a_worker_that_dies_is_reported(folder, tmp_path, capsys, monkeypatch):
    def die(*args):
        raise BrokenProcessPool

    monkeypatch.setattr(prepare, "_write_shard", die)
    monkeypatch.setattr(os, "_exit", sys.exit)  # the program ends at once, and must not take the tests with it
    with pytest.raises(SystemExit) as caught:
        run(folder, tmp_path / "out")
    assert caught.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fvq_jax: ")]
    assert "a worker process died" in line
    assert "start me again" in line


def test_unreadable_pictures_are_kept_or_left_out_by_name(tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    paths = write_pictures(pictures, NAMES[:60])
    damage(paths[4])
    assert run(pictures, out) == 0
    assert len(ArrayRecordSource(out)) == 60
    (pictures / "link.png").symlink_to("nothing")
    assert "link.png: No such file or directory; --check leaves out" in refusal(capsys, pictures, tmp_path / "other")
    assert run(pictures, tmp_path / "checked", "--check") == 0
    errors = capsys.readouterr().err
    assert f"left out {NAMES[4]!r}: broken PNG" in errors or f"left out {NAMES[4]!r}: image file is truncated" in errors
    assert "left out 'link.png': No such file or directory" in errors
    source = ArrayRecordSource(tmp_path / "checked")
    assert len(source) == 59
    assert source.classes == ["", "class0", "class1", "class2"]
    kept = [path for path in sorted(pictures.rglob("*.png")) if path not in (paths[4], pictures / "link.png")]
    assert [source[index]["image"] for index in range(59)] == [path.read_bytes() for path in kept]
    for path in paths:
        path.write_bytes(b"")
    assert "none of the 61 files" in refusal(capsys, pictures, tmp_path / "nothing", "--check")
