"""Eight simulated CPU devices for every test, and rank promotion treated as the bug it usually is."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 1 compiles a third faster, and the suite's programs are too small for higher ones to make them run faster.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests that run the same tiny program several times compile it once.
_CACHE = tempfile.TemporaryDirectory(prefix="fvq_jax-compiled-")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
