import jax
import jax.numpy as jnp
import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.training.trace import Trace, parse_steps


def test_steps_are_read_from_the_flag():
    assert parse_steps("") is None
    assert parse_steps("10:20") == (10, 20)
    for wrong in ("10", "20:10", "0:3", "a:b", "1:2:3"):
        with pytest.raises(InputError, match="profile_steps"):
            parse_steps(wrong)


def run(trace, steps):
    started = []
    with trace:
        for step in steps:
            trace.before(step)
            trace.after(step, jax.jit(jnp.sin)(float(step)))
            started.append(trace._running)
    return started


def test_only_the_chosen_steps_are_traced(tmp_path):
    assert run(Trace(tmp_path, (2, 3)), [1, 2, 3, 4]) == [False, True, False, False]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_nothing_is_traced_without_steps_or_after_them(tmp_path):
    run(Trace(tmp_path, None), [1, 2])
    run(Trace(tmp_path, (1, 2)), [3, 4])
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
    run(Trace(tmp_path, (2, 30)), [2, 3])
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
