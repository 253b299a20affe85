import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys
from fvq_jax.runtime.flags import CONFIG, WORKDIR, parse_flags
rest = parse_flags(sys.argv)
sys.stdout.write(f"{rest[1:]} {WORKDIR.value} {CONFIG.value and CONFIG.value.optim.hold}")
"""
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    config = ConfigDict({"seed": 0, "optim": {"hold": 0.3, "learning_rate": 1.0}}).lock()
    config = ConfigDict({"network": {"codes": {"bridge": "none", "sizes": (1, 2)}}, **config}).lock()
    %s
    return config
"""


@pytest.fixture
def read(tmp_path):
    """Reads flags in a program of its own, with a config file that does this; returns what it ends with."""

    def read(*flags, does="", apart=False):
        (tmp_path / "small.py").write_text(CONFIG % does)
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            *(["--config", "small.py"] if apart else ["--config=small.py"]),
            *flags,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        return ended.returncode, ended.stdout, ended.stderr

    return read


def test_flags_and_overrides_are_read(read):
    found = read("more", "--workdir=here", "--config.optim.hold=0.5", "--config.network.codes.sizes=(3,)")
    assert found == (0, "['more'] here 0.5", "")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.network.brigde=x", "unknown config field network.brigde; did you mean network.codes.bridge?"),
        ("--config.network.bridge=none", "unknown config field network.bridge; did you mean network.codes.bridge?"),
        ("--config.optim.lerning_rate=1", "unknown config field optim.lerning_rate; did you mean optim.learning_rate?"),
        ("-config.optm.hold=1", "unknown config field optm.hold; did you mean optim.hold?"),
        ("--config.sed=1", "unknown config field sed; did you mean seed?"),
        ("--config.zzz.qqq=1", "unknown config field zzz.qqq"),
    ],
)
def test_a_misspelt_field_is_named_with_its_section_and_with_what_was_meant(read, flag, message):
    assert read("--config.seed=1", flag) == (2, "", f"fvq_jax: {message}\n")


def test_the_config_file_may_follow_its_flag(read):
    message = "unknown config field optim.holdd; did you mean optim.hold?"
    assert read("--config.optim.holdd=1", apart=True) == (2, "", f"fvq_jax: {message}\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=0", "--distributed"], "--num_processes must be 1 to 10,000,000, not 0"),
        (["--process_id=-1", "--distributed"], "--process_id must be 0 to 10,000,000, not -1"),
        (["--distributed_timeout=0"], "--distributed_timeout must be 1 to 10,000,000, not 0"),
        (["--coordinator=a:1"], "--coordinator, --num_processes and --process_id do nothing without --distributed"),
    ],
)
def test_a_place_that_cannot_be_is_refused(flags, message):
    program = "import sys; from fvq_jax.runtime.flags import parse_flags, place; parse_flags(sys.argv); place()"
    ended = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (2, f"fvq_jax: {message}\n")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.optim.hold=much", ["config.optim.hold", "much"]),
        ("--config.network.codes=1", ["network.codes"]),
        ("--bogus=1", ["bogus"]),
        ("--wrkdir=here", ["wrkdir", "workdir"]),
    ],
)
def test_any_other_mistake_is_one_line_too(read, flag, words):
    code, out, err = read(flag)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("fvq_jax: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("config.optim.learning_rte = 1", ['"learning_rte" does not exist', 'Did you mean "learning_rate"']),
        ("config.optm.hold = 1", ['Did you mean "optim" instead of "optm"?']),
        ("{}['nothing']", ["nothing"]),
        ("config.network.codes.brdge = 1", ['Did you mean "bridge"']),
        ("from fvq_jax.config import default_config", ["cannot import name 'default_config'"]),
        ("nme", ["NameError: name 'nme' is not defined"]),
        ("raise RuntimeError('two\\nlines')", ["RuntimeError: two lines"]),
        ("int('x')", ["ValueError: invalid literal"]),
        ("raise OSError('no file')", ["OSError: no file"]),
    ],
)
def test_a_mistake_in_the_config_file_is_one_line_with_file_line_and_its_text(read, does, words):
    code, out, err = read(does=does)
    assert (code, out) == (2, "")
    (message,) = err.splitlines()
    assert message.startswith("fvq_jax: the config file cannot be used: ")
    for word in words:
        assert word in message
    assert message.endswith(f" (small.py, line 7: {does})")
    assert "Other fields" not in message


def test_a_mistake_in_the_config_file_comes_before_one_in_an_override(read):
    code, _, err = read("--config.sed=1", does="config.optim.learning_rte = 1")
    assert code == 2
    assert "learning_rte" in err


def test_a_config_file_that_returns_nothing_says_so(read):
    message = "get_config() of small.py returns nothing: it must return a ConfigDict"
    code, _, err = read(does="return")
    assert (code, err.splitlines()[-1]) == (2, f"fvq_jax: {message}")


def test_a_missing_config_file_is_named(tmp_path):
    command = [sys.executable, "-c", PROGRAM, "--config=missing.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line == "fvq_jax: the config file missing.py cannot be read: No such file or directory"


def test_without_a_config_there_is_nothing_to_refuse(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "[] None None"
