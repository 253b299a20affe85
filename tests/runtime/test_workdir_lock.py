import errno
import fcntl
import logging
import os
import socket

import pytest

from fvq_jax.runtime import workdir_lock
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.workdir_lock import hold


def test_who_holds_a_workdir_is_named_until_it_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "PATIENCE", 0.3)
    with hold(tmp_path):
        holder = f"process {os.getpid()} on {socket.gethostname()} since "
        with pytest.raises(InputError, match=f"workdir {tmp_path} is in use by {holder}"), hold(tmp_path):
            pass
    with hold(tmp_path):
        pass


def test_a_lock_that_is_given_back_soon_is_waited_for(tmp_path, monkeypatch):
    """As after `kill -9`: the process has ended, and its memory is still being given back."""
    calls = []

    def busy_once(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", busy_once)
    with hold(tmp_path):
        assert calls == 2 * [fcntl.LOCK_EX | fcntl.LOCK_NB]


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), hold(tmp_path):
        assert f"{tmp_path} has no locks" in caplog.text


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(InputError, match=f"workdir {tmp_path} cannot be written: Is a directory"), hold(tmp_path):
        pass
