"""Nine points: codes of 4 to 1,024 dimensions; with `smoke`, five of 4 to 64.

The paper: all codes are used at every dimension it tries, up to 512, and reconstructions gain from more dimensions. A
later paper (StableVQ) finds that FVQ uses only 18.75 % of the codes at 1,024 dimensions.
How to start it, hardware and arguments: base.py.
"""

from configs.ablations import base
from configs.ablations.base import get_config as get_config


def sweep(arg=""):
    """Powers of two."""
    for exponent in range(2, 7 if base.is_smoke(arg) else 11):
        yield {"tokenizer.quantizer.code_dim": 2**exponent}
