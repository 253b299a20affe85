"""Flags with which XLA compiles the small programs of the suite faster, here and in the programs that tests start."""

from importlib.metadata import version

# Two thirds of the suite's time go into compiling, and hardly any into running what was compiled: without optimization
# whole training steps compile in half of the time. The emitters before "fusion emitters" take two thirds of the time
# for a small program, in the series that still has them.
FLAGS = [
    "--xla_backend_optimization_level=0",
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
]
