"""Command lines of the programs that read no config: argparse with errors in one line, and the options they share."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.exits import fail
from fvq_jax.runtime.paths import with_home
from fvq_jax.runtime.processes import OPTIONS, TIMEOUT, Place


class Parser(argparse.ArgumentParser):
    """argparse, with bad arguments reported by `fail` instead of in several lines."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, with `~` standing for the home directory."""
        return super().parse_known_args(with_home(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str) -> NoReturn:
        """Writes the message in one line and ends the program with exit code 2."""
        sys.exit(fail(f"{message} (see python -m {self.prog} --help)"))


def some_text(text: str) -> str:
    """Refuses an empty argument, as a shell makes of a variable that is not set; for `type` of argparse."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("is empty" if not text else "holds a null byte")
    return text


def some_path(text: str) -> Path:
    """Converts a path that is not empty, for an empty one would be the folder one is in; for `type` of argparse."""
    return Path(some_text(text))


_JOINED = 16  # parts of a name between commas that are tried at most


def listed_paths(text: str) -> list[str]:
    """The paths between the commas of an argument. A comma is part of a name if a file or folder is called so."""
    parts, paths = text.split(","), []
    while parts:
        joined = [",".join(parts[:count]) for count in range(min(len(parts), _JOINED), 0, -1)]
        path = next((path for path in joined if path and os.path.exists(path)), parts[0])
        parts = parts[path.count(",") + 1 :]
        paths += [path] if path else []
    return paths


def true_or_false(text: str) -> bool:
    """Converts an argument that must be true or false; for `type` of argparse."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def class_or_null(text: str) -> int | str:
    """Converts the label of a class, or `null` for no class; for `type` of argparse."""
    if not text.isdecimal() and text != "null":
        raise argparse.ArgumentTypeError(f"must be a label such as 7, or null, not {text!r}")
    return int(text) if text.isdecimal() else text


def grid_sides(text: str) -> tuple[int, int]:
    """Converts rows x columns of a grid; for `type` of argparse."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be rows x columns such as 16x16, not {text!r}")
    return int(match[1]), int(match[2])


def whole_numbers(text: str) -> tuple[int, ...]:
    """Converts whole numbers with commas between them; for `type` of argparse."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 1,2,4, not {text!r}")
    return tuple(map(int, text.split(",")))


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds the options that make a program one of several processes; `place` reads them."""
    kinds = {"num_processes": int, "process_id": int, "coordinator": str}
    parser.add_argument("--distributed", action="store_true", help=OPTIONS["distributed"])
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind, help=OPTIONS[name])
    parser.add_argument(
        "--distributed_timeout",
        type=int,
        default=TIMEOUT,
        help=f"{OPTIONS['distributed_timeout']} (default: %(default)s)",
    )


def place(args: argparse.Namespace) -> Place | None:
    """The place among several processes that the options of `add_place` give, see `Place.of`.

    Ends the program with one line if they cannot be.
    """
    where = (args.coordinator, args.num_processes, args.process_id)
    try:
        return Place.of(args.distributed, args.distributed_timeout, *where)
    except InputError as error:
        sys.exit(fail(str(error)))
