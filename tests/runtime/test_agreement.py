import json

import pytest

from fvq_jax.runtime.agreement import check_same, everywhere, gather_texts
from fvq_jax.runtime.errors import InputError
from tests.helpers.two_hosts import free_port, start_host

# Two of these say what they saw.
PROGRAM = """
import json, sys
import jax
from fvq_jax.runtime.agreement import check_same, everywhere, gather_texts
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.processes import Place

Place(60).join()
me = jax.process_index()

def refuse(where, message="no such folder"):
    def action():
        if me in where:
            raise InputError(message)
        return f"done by {me}"
    return action

def outcome(action):
    try:
        return action()
    except InputError as error:
        return f"{error}, in all" if error.shared else str(error)

print(json.dumps([
    gather_texts("" if me else "h\u00e9llo"),
    outcome(lambda: everywhere(refuse([]))),
    outcome(lambda: everywhere(refuse([1]))),
    outcome(lambda: everywhere(refuse([0, 1]))),
    outcome(lambda: check_same({"config": {"seed": 0, "optim": {"rate": 0.1}}, "checkpoint": 7})),
    outcome(lambda: check_same({"config": {"optim": {"rate": 0.1 * (me + 1)}}, "checkpoint": [7, None][me]})),
]))
"""


def test_two_processes_share_errors_and_name_what_differs():
    port = free_port()
    processes = [start_host(index, 2, port, "-c", PROGRAM) for index in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for index, (out, _) in enumerate(outputs):
        texts, well, one_fails, both_fail, same, other = json.loads(out.splitlines()[-1])
        assert texts == ["héllo", ""]
        assert well == f"done by {index}"
        assert one_fails == "process 1: no such folder, in all"
        assert both_fail == "no such folder, in all"
        assert same is None
        assert other.startswith(
            "process 1 differs from process 0: checkpoint is None and not 7, config.optim.rate is 0.2"
        )


def test_a_single_process_agrees_with_itself():
    assert gather_texts("alone") == ["alone"]
    assert everywhere(lambda: 3) == 3
    check_same({"seed": 0})

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match=r"^no$"):
        everywhere(refuse)
