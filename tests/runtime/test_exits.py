import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from fvq_jax.runtime import exits
from fvq_jax.runtime.errors import DataError, InputError, NonFiniteError, RunError, StorageError

LAST_WORDS = """
import os, sys
from fvq_jax.runtime.exits import last_words
with last_words("this was the end"):
    {}
"""


def python(program):
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os.abort()", "os._exit(1)"])
def test_whoever_is_ended_from_outside_has_a_last_line(end):
    assert python(LAST_WORDS.format(end)).stderr.splitlines()[-1] == "this was the end"


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise ValueError"])
def test_whoever_ends_in_order_says_nothing_more(end):
    assert "this was the end" not in python(LAST_WORDS.format(end)).stderr


def raising(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize("code", [0, exits.INTERRUPTED])
def test_a_program_that_ends_well_has_its_own_code_and_says_nothing(capsys, code):
    assert exits.run(lambda: code) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("no such\n  folder"), 2), (NonFiniteError("no such\n  folder"), 1)]
)
def test_an_error_that_all_processes_see_is_one_line_and_a_code(capsys, error, code):
    assert exits.run(raising(error)) == code
    assert capsys.readouterr() == ("", "fvq_jax: no such folder\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("resumes", [False, True])
def test_a_signal_is_one_line_that_says_what_is_kept(capsys, number, code, resumes):
    def program():
        os.kill(os.getpid(), number)
        return 0

    assert exits.run(program, kept="half of it", resumes=resumes) == (exits.INTERRUPTED if resumes else code)
    assert capsys.readouterr() == ("", f"fvq_jax: interrupted by {number.name}: half of it\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_callback_whose_errors_python_ignores_is_not_lost(capfd, number, code):
    class Freed:
        def __del__(self):
            signal.raise_signal(number)

    def program():
        Freed()
        time.sleep(60)

    before = sys.unraisablehook
    assert exits.run(program) == code
    assert capfd.readouterr().err == f"fvq_jax: interrupted by {signal.Signals(number).name}: nothing was written\n"
    assert sys.unraisablehook is before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out: take fewer"),
        (
            np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("f4")),
            "when 4.00 TiB were asked for: take fewer",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 77 bytes."), "when 77 bytes were asked for: take"),
    ],
)
def test_the_end_of_memory_is_one_line_that_says_what_to_reduce(capsys, error, said):
    assert exits.run(raising(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "--batch" in line


def test_an_error_of_a_user_before_the_processes_have_joined_is_one_line_and_code_2(capsys):
    assert exits.run(lambda: 0, raising(InputError("--distributed: cannot join"))) == 2
    assert capsys.readouterr().err == "fvq_jax: --distributed: cannot join\n"


def test_a_mistake_of_the_programmer_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exits.run(raising(ZeroDivisionError("division by zero")))
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):  # there is no other process that could have gone
        exits.run(raising(RuntimeError("UNAVAILABLE: it is gone")))


@pytest.mark.parametrize("error", [RunError, StorageError, DataError])
def test_an_error_that_leaves_threads_hanging_ends_the_process_at_once(error):
    ended = python(f"""
        import sys, threading, time
        from fvq_jax.runtime import exits
        from fvq_jax.runtime.errors import {error.__name__}

        threading.Thread(target=time.sleep, args=(600,)).start()  # which the interpreter would wait for

        def program():
            sys.stdout.write("shown before")
            raise {error.__name__}("the data do not come")

        exits.run(program)
    """)
    assert ended.returncode == 1
    assert (ended.stdout, ended.stderr) == ("shown before", "fvq_jax: the data do not come\n")


@pytest.mark.parametrize("message", ["Gloo timeout", "[3] Connection reset by peer", "UNAVAILABLE: coordination"])
def test_an_error_of_a_collective_says_that_another_process_has_gone(message):
    ended = python(f"""
        import jax
        from fvq_jax.runtime import exits

        jax.process_count = lambda: 2

        def program():
            raise RuntimeError({message!r} + "\\nand much more")

        exits.run(program)
    """)
    assert ended.returncode == 1
    expected = f"fvq_jax: lost another process of this run: {message}; start all of them again\n"
    assert ended.stderr == expected


def test_a_process_of_several_that_is_killed_has_a_last_line():
    ended = python("""
        import os
        from fvq_jax.runtime import exits

        exits.run(lambda: os.kill(os.getpid(), 9), join=lambda: None)
    """)
    assert ended.returncode == -9
    (line,) = ended.stderr.splitlines()
    assert line.startswith("fvq_jax: process 0 on ")
    assert line.endswith("was killed; start all of them again")


@pytest.mark.parametrize("platform", ["cuda", "nothing"])
def test_a_platform_that_is_not_there_is_one_line(platform):
    program = """
        import os, sys
        from fvq_jax.runtime import exits
        import jax
        sys.exit(exits.run(lambda: len(jax.devices())))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == exits.BAD_INPUT
    assert f"fvq_jax: JAX cannot start on JAX_PLATFORMS={platform}: " in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
