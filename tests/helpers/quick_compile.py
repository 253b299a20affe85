"""Flags with which XLA compiles the small programs of the suite faster, here and in the programs that tests start."""

from importlib.metadata import version

# Level 1 compiles a third faster, and the programs are too small for higher ones to make them run faster. The emitters
# before "fusion emitters" compile a small program in less than half of the time, in the series that still has them.
FLAGS = [
    "--xla_backend_optimization_level=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
]
