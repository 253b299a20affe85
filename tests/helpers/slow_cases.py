"""Cases of a parametrised test that show again what its first case shows."""

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """The same cases, marked as slow."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


# The shapes [data, codebook] of meshes on which results must be equal: both axes at once, neither, each alone.
MESHES = [(2, 4), *slow((1, 1), (8, 1), (1, 8))]
