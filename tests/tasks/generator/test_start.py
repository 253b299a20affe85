import numpy as np
import pytest
import safetensors.numpy

from fvq_jax.interop.gpt_layout import gpt_tensors
from fvq_jax.runtime.names import flatten
from fvq_jax.tasks.generator.start import load_params
from tests.helpers.random_generator import random_generator


@pytest.mark.parametrize("path", ["", "model.safetensors"])
def test_what_the_tensors_of_a_file_do_not_tell_is_as_in_the_new_run(path, tmp_path):
    saved = random_generator(grid=(2, 8))
    tensors = {name: np.ascontiguousarray(value) for name, value in gpt_tensors(saved.net, saved.params).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    loaded, expected = flatten(load_params(tmp_path / path, saved.net)), flatten(saved.params)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
