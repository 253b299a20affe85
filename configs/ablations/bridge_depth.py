"""Three points: 1, 2 and 4 blocks in the bridge.

The paper: two are best, one underfits, four degrade.
How to start it, hardware and arguments: base.py.
"""

from configs.ablations import base
from configs.ablations.base import get_config as get_config


def sweep(arg=""):
    """The base's bridge, which has two blocks, with fewer and with more."""
    bridge = base.get_config(arg).tokenizer.quantizer.bridge
    for name in (f"{bridge}-d1", bridge, f"{bridge}-d4"):
        yield {"tokenizer.quantizer.bridge": name}
