"""Six points: 1,024 to 1,048,576 codes, the bridge's groups growing along; with `smoke`, four of 64 to 4,096.

The paper: all codes are used up to its largest codebook, 262,144, and rFID falls from 1.30 (16,384) to 0.95. Groups
follow its recipes (4 x 4 codes at 16,384, 8 x 8 at 65,536 and 262,144) and, below them, its rule: four times the codes,
four times the group.
Hardware: with --config.mesh.codebook=N the codebook is divided over N devices; every size takes powers of two to 32.
How to start it, and arguments: base.py.
"""

from configs.ablations import base
from configs.ablations.base import get_config as get_config

PAPER = {1024: "L/1", 4096: "L/2", 16384: "L/4", 65536: "L/8", 262144: "L/8", 1048576: "L/16"}
SMOKE = {64: "S/1", 256: "S/2", 1024: "S/4", 4096: "S/8"}


def sweep(arg=""):
    """Every size with its bridge."""
    for codes, bridge in (SMOKE if base.is_smoke(arg) else PAPER).items():
        yield {"tokenizer.quantizer.codebook_size": codes, "tokenizer.quantizer.bridge": bridge}
