"""Fifteen points: codebooks of 4,096 to 262,144 codes, in groups of 2 x 2 to 16 x 16; with `smoke`, six points.

The paper: the group should grow fourfold when the codebook does (4 codes at 4,096, 16 at 16,384).
Groups of 2 x 2 in 262,144 codes are left out: attention among 65,536 tokens would need tens of gigabytes.
How to start it, hardware and arguments: base.py.
"""

from configs.ablations import base
from configs.ablations.base import get_config as get_config

MOST_TOKENS = 16384


def sweep(arg=""):
    """Every size with every group that gives the bridge at most MOST_TOKENS tokens."""
    smoke = base.is_smoke(arg)
    size = "S" if smoke else "L"
    for codes in (256, 1024) if smoke else (4096, 16384, 65536, 262144):
        for patch in (1, 2, 4) if smoke else (2, 4, 8, 16):
            if codes // patch**2 <= MOST_TOKENS:
                yield {"tokenizer.quantizer.codebook_size": codes, "tokenizer.quantizer.bridge": f"{size}/{patch}"}
