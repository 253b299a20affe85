"""Ten points: every kind of bridge, with and without learning annealing.

The paper: without a bridge most codes die (VQGAN 5.9 %, LlamaGen 0.29 % of 16,384 used); a linear bridge uses all of
16,384 only without annealing, and five linear layers fail at 262,144; VQBridge uses all in either case, and annealing
takes its rFID from 2.61 to 1.30. Without annealing means a constant rate after the same warm-up.
How to start it, hardware and arguments: base.py.
"""

from configs.ablations import base
from configs.ablations.base import get_config as get_config


def sweep(arg=""):
    """Every bridge twice."""
    size = "S/2" if base.is_smoke(arg) else "L/4"
    for bridge in ("none", "linear", "mlp5", size, f"dit-{size}"):
        for decay in ("linear", "constant"):
            yield {"tokenizer.quantizer.bridge": bridge, "optim.decay": decay}
