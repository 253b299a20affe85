"""Eight simulated CPU devices for every test, and rank promotion treated as the bug it usually is."""

import gc
import os
import signal
import tempfile

from tests.helpers.quick_compile import FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
# A user's own flags stay, for instance --xla_cpu_max_isa=AVX, with which the suite runs as on an older processor.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(  # each once, for the workers of pytest-xdist inherit them
        [*os.environ.get("XLA_FLAGS", "").split(), "--xla_force_host_platform_device_count=8", *FLAGS]
    )
)

os.environ["HF_HUB_OFFLINE"] = "1"  # no name that a test makes up is asked for

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# A tiny program is compiled once, for all tests, the programs that they start, and the next run of the suite.
_COMPILED = os.path.join(tempfile.gettempdir(), f"fvq_jax-tests-compiled-{os.getuid()}")
os.makedirs(_COMPILED, mode=0o700, exist_ok=True)
for name, value in (
    ("jax_compilation_cache_dir", _COMPILED),
    ("jax_persistent_cache_min_compile_time_secs", 0.0),
):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

# Tracing makes many objects that live long: by default Python spends a twelfth of the time looking for garbage in them.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

# A shell's background jobs ignore Ctrl-C, and so would every program that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _little_is_left_behind():
    """The programs of a file go with it, which halves the memory of a worker, and nobody looks for garbage in the rest.

    A pipeline that closes has Python look for garbage: seconds, among all that many tests leave behind.
    """
    gc.collect()
    gc.freeze()
    yield
    jax.clear_caches()


@pytest.fixture
def no_drawing(monkeypatch):
    """For pages of which only the words matter: plots are drawn in tests of their own."""
    monkeypatch.setattr("fvq_jax.report.figures.to_svg", lambda figure, name: "<svg></svg>")
