import numpy as np
import pytest

from tests.helpers.golden64 import in_float32, in_float64
from tests.helpers.golden_case import load_case, relative_error

GOLDEN_CASES = {"rq": "codes", "var_multiscale": "indices"}


@pytest.mark.parametrize(
    ("run", "forward"), [(in_float64, 1e-5), pytest.param(in_float32, 1e-4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_codes_values_and_gradients_equal_the_published_ones(case, run, forward):
    expected, actual = load_case(case).outputs, run(case)
    np.testing.assert_array_equal(actual["codes"], expected[GOLDEN_CASES[case]])
    assert relative_error(actual["quantized"], expected["quantized"]) < forward
    for loss in ("vq_loss", "commit_loss"):
        np.testing.assert_allclose(actual[loss], expected[loss], rtol=forward, err_msg=loss)
    assert relative_error(actual["grad_z"], expected["grad_z"]) < 1e-3
    norms = {key.removeprefix("gradnorm/"): value for key, value in expected.items() if key.startswith("gradnorm/")}
    grads = {key.removeprefix("grad/"): value for key, value in actual.items() if key.startswith("grad/")}
    assert not grads.pop("qbridge.pos_embed").any()
    assert set(grads) == set(norms)
    for key, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(grads[key]), norm, rtol=1e-3, err_msg=key)
