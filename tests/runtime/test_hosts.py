import jax
import numpy as np

from fvq_jax.evals.frechet import FeatureStatistics
from fvq_jax.runtime import hosts
from tests.helpers.two_hosts import on_two_hosts


def statistics():
    rng = np.random.default_rng(0)
    found = FeatureStatistics.empty(7)
    found.add(rng.normal(size=(20, 7)))
    return {"features": found, "images": np.int64(2**40 + 1), "nothing": None, "psnr": np.float64(1 / 3)}


def twice(x):
    return np.stack([jax.numpy.asarray(x)] * 2)


def test_one_host_keeps_what_it_has():
    tree = statistics()
    assert hosts.sum_over_hosts(tree) is tree
    assert hosts.min_over_hosts(tree) is tree
    assert hosts.rows_of_all_hosts(tree["features"].total) is tree["features"].total


def test_sums_are_exact_in_64_bits(monkeypatch):
    """JAX itself would round float64 to float32 on the way; chunks of any size give the same."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_CHUNK", 10)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", twice)
    summed = hosts.sum_over_hosts(statistics())
    expected = jax.tree.map(lambda leaf: leaf + leaf, statistics())
    assert summed["images"] == 2**41 + 2
    assert jax.tree.structure(summed) == jax.tree.structure(expected)
    for actual, wanted in zip(jax.tree.leaves(summed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(actual, wanted, strict=True)


def test_small_integers_and_empty_arrays_keep_their_type(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", twice)
    summed = hosts.sum_over_hosts({"pixels": np.full((2, 3), 7, np.uint8), "none": np.zeros((0, 4))})
    np.testing.assert_array_equal(summed["pixels"], np.full((2, 3), 14, np.uint8), strict=True)
    np.testing.assert_array_equal(summed["none"], np.zeros((0, 4)), strict=True)


def test_least_values_and_rows_of_two_hosts(monkeypatch):
    own = [np.array([5, 2**62, 3]), np.array([7, 2**62 - 1, 1])]
    for found in on_two_hosts(monkeypatch, lambda index: hosts.min_over_hosts(own[index])):
        np.testing.assert_array_equal(found, [5, 2**62 - 1, 1], strict=True)
    rows = [np.arange(6, dtype=np.uint8).reshape(1, 2, 3) + 100 * index for index in range(2)]
    for found in on_two_hosts(monkeypatch, lambda index: hosts.rows_of_all_hosts(rows[index])):
        np.testing.assert_array_equal(found, np.concatenate(rows), strict=True)
