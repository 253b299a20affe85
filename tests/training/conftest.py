import pytest

from fvq_jax.tasks import TASKS
from tests.helpers.regression import RegressionTask


@pytest.fixture(autouse=True, scope="session")
def registered():
    """The second task has a name in configs, as long as tests of this folder run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "regression", RegressionTask)
        yield
