import jax
import numpy as np
import pytest

from fvq_jax.runtime import row_parallel
from fvq_jax.runtime.row_parallel import RowParallel


@pytest.mark.parametrize(
    ("rows", "budget", "seen"),
    [
        (16, 1 << 30, (16,)),  # two on each of eight devices
        (16, 80, (8, 8)),  # six values of a row, ten bytes each
        (48, 120, (16, 16, 16)),
        (48, 200, (24, 24)),  # three of six at once, for four do not divide six
        (7, 1, (1,) * 7),  # one device, one row: less is not possible
        (5, 10_000, (5,)),
    ],
)
def test_rows_that_need_more_than_the_budget_go_in_parts(rows, budget, seen, monkeypatch):
    shapes = []

    def program(params, a, b):
        jax.debug.callback(lambda: shapes.append(a.shape))
        return {"sum": params + a.sum((1, 2)) + b}

    monkeypatch.setattr(row_parallel, "BUDGET", budget)
    a, b = np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3), np.arange(rows, dtype=np.float32)
    run = RowParallel(program, np.float32(1), bytes_per_value=10)
    np.testing.assert_array_equal(run(a, b)["sum"], 1 + a.sum((1, 2)) + b)
    jax.effects_barrier()
    assert [shape[0] for shape in shapes] == list(seen)


def test_a_batch_without_rows_and_a_program_without_a_need():
    run = RowParallel(lambda params, rows: rows * params, np.float32(2))
    assert run(np.zeros((0, 3), np.float32)).shape == (0, 3)
    np.testing.assert_array_equal(run(np.ones((9, 3), np.float32)), np.full((9, 3), 2))


def test_its_program_is_compiled_with_the_options_of_its_devices(monkeypatch):
    monkeypatch.setattr(row_parallel, "compiler_options", lambda mesh: {"no_such_option": mesh.size})
    run = RowParallel(lambda params, rows: rows * params, np.float32(2))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        run(np.ones((9, 3), np.float32))
