import errno
import os

import pytest

from fvq_jax.runtime.errors import InputError, StorageError
from fvq_jax.runtime.storage import brief, complete_steps, require_prompt_listing, saving_errors, storage_errors


@pytest.fixture
def workdir(tmp_path):
    for name in ("step_3", "step_12", "step_15.orbax-checkpoint-tmp", "steps"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    return tmp_path


def test_only_checkpoints_with_their_final_name_are_complete(workdir):
    assert sorted(complete_steps(workdir)) == [3, 12]
    assert complete_steps(workdir / "new") == []


def test_a_folder_that_also_has_its_longer_name_is_still_on_its_way(workdir):
    """As in a bucket, where a folder is renamed file by file."""
    (workdir / "checkpoints" / "step_15").mkdir()
    assert sorted(complete_steps(workdir)) == [3, 12]


def test_a_folder_that_lists_files_late_is_refused(tmp_path, monkeypatch):
    require_prompt_listing(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "listdir", lambda path: [])
    with pytest.raises(InputError, match="does not list a file as soon as it is written"):
        require_prompt_listing(tmp_path)
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        require_prompt_listing(tmp_path / "missing")


def test_errors_of_the_disk_say_what_is_safe(workdir):
    message = rf"a file of the run .* in {workdir}: No space left on device; the checkpoint of step 12 is complete"
    with pytest.raises(StorageError, match=message), storage_errors(workdir):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_pass(workdir):
    with pytest.raises(FileNotFoundError), storage_errors(workdir):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")
    with pytest.raises(InputError, match="as it was"), saving_errors("step 15", workdir):
        raise InputError("as it was")


@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError])
def test_whatever_a_library_raises_while_it_saves_is_one_line(workdir, kind):
    message = r"step 15 could not be written in .*: first; the checkpoint of step 12 is complete"
    with pytest.raises(StorageError, match=message), saving_errors("step 15", workdir):
        raise kind("first\nsecond")


def test_what_the_system_said_is_found_in_a_long_text():
    assert brief(ValueError("RESOURCE_EXHAUSTED: write: No space left on device [os_error_code='28']")) == (
        "No space left on device"
    )
    assert brief(KeyError()) == "KeyError"


def test_without_a_checkpoint_the_run_starts_from_the_beginning(tmp_path):
    with (
        pytest.raises(StorageError, match=r"there is no complete checkpoint yet: start again from the beginning$"),
        saving_errors("step 2", tmp_path),
    ):
        raise OSError(28, "No space left on device")
