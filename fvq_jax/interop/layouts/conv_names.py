"""Names of the convolutional networks in published files, of which there are two families.

Both come from VQGAN (arXiv 2012.09841): its own names, and those that LlamaGen gave to the same layers.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from fvq_jax.interop.evidence import Evidence
from fvq_jax.models.layers import GROUPS
from fvq_jax.runtime.errors import InputError

_LAYER = {"shortcut": "nin_shortcut", "out": "proj_out"}
_LAYERS = r"(norm1|norm2|norm|conv1|conv2|conv|nin_shortcut|q|k|v|qkv|proj_out)"


@dataclasses.dataclass(frozen=True)
class ConvNames:
    """One family of names.

    Attributes:
      down, up: the lists of levels in the encoder and in the decoder.
      res: the list of residual blocks in a level; that of attention blocks is `attn` everywhere.
      mid: the names of our blocks in the middle.
      up_from_lowest: whether the decoder counts its levels from the lowest resolution.
    """

    down: str
    up: str
    res: str
    mid: Mapping[str, str]
    up_from_lowest: bool

    def name(self, path: str, levels: int) -> str:
        """The published name of a parameter of encoder or decoder, for instance of encoder/conv_in/conv/kernel.

        `levels` is the number of resolutions.
        """
        part, *middle, leaf = path.split("/")
        block, *layer = middle[:-1]  # the last name is the Flax layer inside ours
        if match := re.fullmatch(r"level(\d+)_([a-z]+?)(\d*)", block):
            flip = part == "decoder" and self.up_from_lowest
            level = levels - 1 - int(match[1]) if flip else int(match[1])
            kind = {"res": self.res, "attention": "attn"}.get(match[2], match[2])
            block = ".".join(filter(None, (self.up if part == "decoder" else self.down, str(level), kind, match[3])))
        layers = (_LAYER.get(name, name) for name in layer)
        return ".".join((part, self.mid.get(block, block), *layers, "bias" if leaf == "bias" else "weight"))

    def infer(self, evidence: Evidence) -> dict[str, Any]:
        """The settings of `TokenizerNet` that the networks show. InputError if they are none that exist here."""
        level = f"encoder.{self.down}"
        places = ("conv_in.weight 0", "conv_in.bias 0", f"{self.down}.0.{self.res}.0.norm1.bias 0")
        ch = evidence.size(*(f"encoder.{place}" for place in places))
        levels = evidence.count(rf"{re.escape(level)}\.(\d+)\.")
        widths = []
        for number in range(levels):
            block = f"{level}.{number}.{self.res}.0"
            widths.append(evidence.size(f"{block}.conv1.weight 0", f"{block}.conv1.bias 0", f"{block}.norm2.weight 0"))
        if any(width % ch or width % GROUPS for width in widths) or ch % GROUPS:
            raise InputError(
                f"{evidence.source} has {ch} channels at first and {', '.join(map(str, widths))} in its levels, "
                f"which must be multiples of the first and of {GROUPS}"
            )
        attention = tuple(evidence.numbers(rf"{re.escape(level)}\.(\d+)\.attn\."))
        return {
            "ch": ch,
            "ch_mult": tuple(width // ch for width in widths),
            "num_res_blocks": evidence.count(rf"{re.escape(level)}\.0\.{self.res}\.(\d+)\."),
            "z_channels": evidence.size(
                "encoder.conv_out.weight 0", "encoder.conv_out.bias 0", "post_quant_conv.bias 0"
            ),
            "attention_levels": (-1,) if attention == (levels - 1,) else attention,
        }

    @property
    def pattern(self) -> str:
        """What all names of the family match."""
        levels = rf"({self.down}|{self.up})\.\d+\.(({self.res}|attn)\.\d+\.{_LAYERS}|(down|up)sample\.conv)"
        mid = rf"({'|'.join(map(re.escape, self.mid.values()))})\.{_LAYERS}"
        return rf"(encoder|decoder)\.(conv_in|conv_out|norm_out|{mid}|{levels})\.(weight|bias)"


LLAMAGEN_CONVS = ConvNames(
    "conv_blocks", "conv_blocks", "res", {"mid_res0": "mid.0", "mid_attention": "mid.1", "mid_res1": "mid.2"}, True
)
VQGAN_CONVS = ConvNames(
    "down", "up", "block", {"mid_res0": "mid.block_1", "mid_attention": "mid.attn_1", "mid_res1": "mid.block_2"}, False
)
