import argparse

import pytest

from fvq_jax.runtime.arguments import Parser, add_place, listed_paths, place, some_path, true_or_false
from fvq_jax.runtime.processes import TIMEOUT, Place


def parser():
    parser = Parser("fvq_jax.program")
    parser.add_argument("--fold", type=true_or_false, default=True)
    parser.add_argument("--at", type=some_path)
    add_place(parser)
    return parser


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("TRUE", True)])
def test_true_or_false(text, value):
    assert parser().parse_args([f"--fold={text}"]).fold is value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fold=yes"], "argument --fold: must be true or false, not 'yes'"),
        (["--at="], "argument --at: is empty"),
        (["--at", "a\0b"], "argument --at: holds a null byte"),
        (["--flod=true"], "unrecognized arguments: --flod=true"),
        (["--num_processes=two"], "argument --num_processes: invalid int value: 'two'"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"fvq_jax: {message} (see python -m fvq_jax.program --help)\n")


def test_true_or_false_is_an_error_of_argparse():
    with pytest.raises(argparse.ArgumentTypeError, match="must be true or false"):
        true_or_false("1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--distributed"], Place(TIMEOUT, None, None, None)),
        (
            ["--distributed", "--coordinator=a:1", "--num_processes=4", "--process_id=0", "--distributed_timeout=9"],
            Place(9, "a:1", 4, 0),
        ),
    ],
)
def test_the_place_among_several_processes(arguments, expected):
    assert place(parser().parse_args(arguments)) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--num_processes=0", "--num_processes must be 1 to 10,000,000, not 0"),
        ("--process_id=4 --num_processes=4", "--process_id=4 is none of the 4 processes: they are numbered from 0"),
        ("--process_id=-1", "--process_id must be 0 to 10,000,000, not -1"),
        ("--distributed_timeout=99999999999", "--distributed_timeout must be 1 to 10,000,000, not 99999999999"),
        ("--distributed_timeout=0", "--distributed_timeout must be 1 to 10,000,000, not 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(capsys, argument, message):
    with pytest.raises(SystemExit) as caught:
        place(parser().parse_args(["--distributed", *argument.split()]))
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"fvq_jax: {message}\n"


@pytest.mark.parametrize("argument", ["--coordinator=a:1", "--num_processes=4", "--process_id=0"])
def test_a_place_without_other_processes_is_refused(capsys, argument):
    with pytest.raises(SystemExit) as caught:
        place(parser().parse_args([argument]))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fvq_jax: ")
    assert line.endswith("do nothing without --distributed")


def test_a_comma_is_part_of_a_name_if_there_is_such_a_file(tmp_path):
    for name in ("a", "rival=x,seed=0", "b,"):
        (tmp_path / name).mkdir()
    there = [f"{tmp_path}/{name}" for name in ("a", "rival=x,seed=0", "b,")]
    assert listed_paths(",".join([*there, "missing", f"{tmp_path}/rival=y,seed=0"])) == [
        *there,
        "missing",
        f"{tmp_path}/rival=y",
        "seed=0",
    ]
    assert listed_paths(",") == listed_paths(",,") == []
    assert listed_paths("x,,y") == ["x", "y"]
    assert listed_paths("x," * 20_000) == ["x"] * 20_000  # without trying every name of so many parts
