"""What stands in the text of a compiled program: its arrays, and what devices send each other."""

import re

ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)


def size(*dims):
    """Sorted, without ones: the same array in any layout."""
    return tuple(sorted(n for n in dims if n > 1))


def arrays(text):
    """(dtype, size) of every array that is named in this text."""
    return {(dtype, size(*map(int, filter(None, dims.split(","))))) for dtype, dims in ARRAY.findall(text)}


def collectives(program):
    """(kind, dtype, size) of everything that a collective of the program results in."""
    found = (COLLECTIVE.search(line) for line in program.splitlines())
    return {(match[2], *array) for match in found if match for array in arrays(match[1])}


def operations(compiled):
    """All operations of a compiled program, sorted, without their names and what else does not change what it does."""
    plain = re.sub(r", metadata=\{[^}]*\}|, backend_config=.*|%[\w.-]+", "", compiled.as_text())
    return sorted(line for line in plain.splitlines() if " = " in line and not line.startswith("HloModule "))
