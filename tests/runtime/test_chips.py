import types

import jax
import jax.numpy as jnp
import pytest

from fvq_jax.runtime import chips


@pytest.mark.parametrize(
    ("kind", "half", "single"),
    [
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5e", 197e12, 197e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.5e12),
        ("NVIDIA GH200 480GB", 989.5e12, 494.5e12),
    ],
)
def test_published_peaks(kind, half, single):
    assert chips._published_flops(kind, jnp.dtype(jnp.bfloat16)) == half
    assert chips._published_flops(kind, jnp.dtype(jnp.float16)) == half
    assert chips._published_flops(kind, jnp.dtype(jnp.float32)) == single


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA RTX A1000", "NVIDIA H20", "TPU v4 lite"])
def test_no_published_figure_is_borrowed_from_a_similar_name(kind):
    assert chips._published_flops(kind, jnp.dtype(jnp.bfloat16)) is None


def test_a_cpu_is_measured_once():
    first = chips.peak_flops(jax.devices()[0], jnp.float32)
    assert 1e8 < first < 1e15
    assert chips.peak_flops(jax.devices()[1], jnp.bfloat16) == first


def test_peak_of_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="not int8"):
        chips.peak_flops(jax.devices()[0], jnp.int8)


def test_model_flops_utilisation():
    devices = jax.devices()
    peak = chips.peak_flops(devices[0])
    assert chips.model_flops_utilisation(peak, 2.0, devices[:1]) == pytest.approx(0.5)
    assert chips.model_flops_utilisation(peak, 2.0, devices[:4]) == pytest.approx(0.5)  # they are one CPU
    assert chips.model_flops_utilisation(peak, 0.0, devices) == 0.0


def test_model_flops_utilisation_is_relative_to_the_peak_of_its_dtype(monkeypatch):
    monkeypatch.setattr(chips, "peak_flops", lambda _, dtype: {jnp.float32: 2.0, jnp.bfloat16: 4.0}[dtype])
    assert chips.model_flops_utilisation(1.0, 1.0, jax.devices()[:1]) == 0.25
    assert chips.model_flops_utilisation(1.0, 1.0, jax.devices()[:1], jnp.float32) == 0.5


def test_peak_memory_is_the_resident_set_on_a_cpu():
    assert 50e6 < chips.peak_device_memory_bytes() < 1e12


def test_peak_memory_is_the_fullest_device(monkeypatch):
    fakes = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (3, 9, 4)]
    monkeypatch.setattr(jax, "local_devices", lambda: fakes)
    assert chips.peak_device_memory_bytes() == 9
