"""Five points: bridges 32, 64, 128, 256 and 512 channels wide (XS, S, B, L, XL).

The paper: a bridge as wide as the codes is best (L, 256). Codes of the smoke size have 16 dimensions, which is less
than any of these widths.
How to start it, hardware and arguments: base.py.
"""

from configs.ablations import base
from configs.ablations.base import get_config as get_config


def sweep(arg=""):
    """The base's groups in bridges of every size."""
    patch = 2 if base.is_smoke(arg) else 4
    for size in ("XS", "S", "B", "L", "XL"):
        yield {"tokenizer.quantizer.bridge": f"{size}/{patch}"}
