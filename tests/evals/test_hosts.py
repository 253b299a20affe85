import jax
import numpy as np

from fvq_jax.evals import hosts
from fvq_jax.evals.frechet import FeatureStatistics


def statistics():
    rng = np.random.default_rng(0)
    found = FeatureStatistics.empty(7)
    found.add(rng.normal(size=(20, 7)))
    return {"features": found, "images": np.int64(2**40 + 1), "nothing": None, "psnr": np.float64(1 / 3)}


def test_one_host_keeps_what_it_has():
    tree = statistics()
    assert hosts.sum_over_hosts(tree) is tree


def test_sums_are_exact_in_64_bits(monkeypatch):
    """JAX itself would round float64 to float32 on the way; chunks of any size give the same."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_CHUNK", 10)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", lambda x: np.stack([jax.numpy.asarray(x)] * 2))
    summed = hosts.sum_over_hosts(statistics())
    expected = jax.tree.map(lambda leaf: leaf + leaf, statistics())
    assert summed["images"] == 2**41 + 2
    assert jax.tree.structure(summed) == jax.tree.structure(expected)
    for actual, wanted in zip(jax.tree.leaves(summed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(actual, wanted, strict=True)
