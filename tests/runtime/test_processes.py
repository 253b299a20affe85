import jax
import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.processes import Place
from tests.helpers.two_hosts import free_port, start_host


def test_a_host_that_never_comes_is_one_line_and_exit_1():
    program = "from fvq_jax.runtime.processes import Place; Place(2).join()"
    process = start_host(1, 2, free_port(), "-c", program)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert "after 2 s not all processes have come: this is process 1 of 2" in line


def test_a_place_that_cannot_be_is_bad_input():
    program = """
from fvq_jax.runtime import exits
from fvq_jax.runtime.processes import Place
raise SystemExit(exits.run(lambda: 0, Place(60, None, 2, 5).join))
"""
    process = start_host(0, 2, free_port(), "-c", program)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    (line,) = err.splitlines()
    assert line.startswith("fvq_jax: --distributed: cannot join the other processes: ")


@pytest.fixture
def joined(monkeypatch):
    """The arguments with which JAX is told to join, by name."""
    found = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda address, **rest: found.update(address=address, **rest))
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    return found


def test_a_place_may_be_given(joined):
    Place(80, "host:1", 4, 0).join()
    assert (joined["address"], joined["num_processes"], joined["process_id"]) == ("host:1", 4, 0)
    assert joined["cluster_detection_method"] == "deactivate"
    assert joined["heartbeat_timeout_seconds"] == 60


def test_what_is_not_given_comes_from_the_environment(joined, monkeypatch):
    for name, value in {"COORDINATOR_ADDRESS": "host:2", "NUM_PROCESSES": "8", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    Place().join()
    assert (joined["address"], joined["num_processes"], joined["process_id"]) == ("host:2", 8, 3)
    Place(index=0).join()
    assert (joined["address"], joined["num_processes"], joined["process_id"]) == ("host:2", 8, 0)


def test_what_is_nowhere_is_left_to_be_detected(joined):
    Place().join()
    assert (joined["address"], joined["num_processes"], joined["process_id"]) == (None, None, None)
    assert joined["cluster_detection_method"] is None


def test_settings_that_make_no_sense_are_bad_input(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match=r"cannot join the other processes: .*'two'"):
        Place().join()


def test_an_error_of_the_network_ends_the_program_with_exit_code_1(monkeypatch, capsys):
    def initialize(*args, **rest):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit) as caught:
        Place().join()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "fvq_jax: --distributed: cannot join the other processes: no route to host\n"
