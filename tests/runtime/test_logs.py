import logging as std_logging
import subprocess
import sys
import textwrap

import pytest
from absl import logging

from fvq_jax.runtime.logs import host_log


def test_log_lines_and_the_last_error_reach_the_file_of_the_host(tmp_path):
    handlers = list(std_logging.getLogger().handlers)

    def work():
        with host_log(tmp_path, 12):
            logging.warning("one line")
            raise ValueError("all is lost")

    with pytest.raises(ValueError, match="lost"):
        work()
    logging.warning("after")
    text = (tmp_path / "logs" / "host_012.log").read_text()
    assert "one line" in text
    assert "ValueError: all is lost" in text
    assert "after" not in text
    assert std_logging.getLogger().handlers == handlers


def said_by(program):
    """Standard error of a program of absl that has set up its logging."""
    setup = """
from absl import app, logging
from fvq_jax.runtime.logs import set_up_logging

def main(argv):
    set_up_logging()
    program()

def program():
"""
    program = textwrap.indent(textwrap.dedent(program), "    ")
    command = [sys.executable, "-c", f"{setup}{program}\napp.run(main)"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300).stderr


def test_of_a_library_only_warnings_are_shown_and_never_a_traceback():
    said = said_by("""
        logging.info("a library opens a file")
        try:
            1 / 0
        except ZeroDivisionError:
            logging.exception("a library complains")
    """)
    assert "opens a file" not in said
    (line,) = said.splitlines()
    assert line.endswith("a library complains")


def test_lines_of_this_package_are_shown_from_info_on():
    said = said_by("""
        from fvq_jax.training.progress import Progress
        with Progress(10, 0) as progress:
            progress.update(5, {"loss": "0.5"})
    """)
    (line,) = said.splitlines()
    assert "step 5/10, loss 0.5" in line


def test_what_ends_a_thread_is_one_line():
    said = said_by("""
        import threading
        def work():
            raise ValueError("no more pictures")
        thread = threading.Thread(target=work, name="reader")
        thread.start()
        thread.join()
    """)
    (line,) = said.splitlines()
    assert line.endswith("reader: no more pictures")


def test_an_error_of_the_program_itself_keeps_its_traceback():
    assert said_by("1 / 0").startswith("Traceback")
