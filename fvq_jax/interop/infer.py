"""Which tokenizer network a set of published tensors belongs to, read off their names and shapes."""

import collections
import re
from collections.abc import Mapping

import numpy as np

from fvq_jax.models.layers import GROUPS
from fvq_jax.models.quantizers.bridge import BridgeSpec, bridge_name, rows_of_groups
from fvq_jax.models.quantizers.vector import VectorQuantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError

_BRIDGE = "quantize.qbridge."


def infer_network(
    tensors: Mapping[str, np.ndarray], source: str = "the checkpoint", *, l2_normalize: bool = False
) -> TokenizerNet:
    """The network whose parameters `tensors` are (published names, FVQ's or LlamaGen's); float32 compute.

    Channels, resolutions, blocks, code number and dimension, and the bridge follow from shapes; `l2_normalize` does
    not, and is taken as given. Each number is the one on which most of the tensors that show it agree. So a tensor that
    is missing or has a wrong shape does not mislead, and `torch_layout.tokenizer_params` can name it.

    Raises:
      InputError: the tensors belong to no tokenizer, or to one that does not exist here; names `source`.
    """
    evidence = Evidence(tensors, source, "FVQ or LlamaGen tokenizer")
    ch = evidence.size("encoder.conv_in.weight 0", "encoder.conv_in.bias 0", "encoder.conv_blocks.0.res.0.norm1.bias 0")
    widths = []
    for level in range(evidence.count(r"encoder\.conv_blocks\.(\d+)\.")):
        block = f"encoder.conv_blocks.{level}.res.0"
        widths.append(evidence.size(f"{block}.conv1.weight 0", f"{block}.conv1.bias 0", f"{block}.norm2.weight 0"))
    if any(width % ch or width % GROUPS for width in widths) or ch % GROUPS:
        raise InputError(
            f"{source} has {ch} channels at first and {', '.join(map(str, widths))} in its levels, "
            f"which must be multiples of the first and of {GROUPS}"
        )
    code_dim = evidence.size("quant_conv.weight 0", "quant_conv.bias 0", "quantize.embedding.weight 1")
    codebook_size = evidence.size("quantize.embedding.weight 0")
    try:
        spec = _infer_bridge(evidence)
        bridge = bridge_name(spec)
        if spec.patch:
            rows_of_groups(codebook_size, spec.group_size, "2d")
    except ValueError as error:
        raise InputError(f"{source} has a bridge that does not exist here: {error}") from None
    return TokenizerNet(
        VectorQuantizer(codebook_size=codebook_size, code_dim=code_dim, bridge=bridge, l2_normalize=l2_normalize),
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=evidence.count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        z_channels=evidence.size("encoder.conv_out.weight 0", "encoder.conv_out.bias 0", "post_quant_conv.bias 0"),
    )


def _infer_bridge(evidence: "Evidence") -> BridgeSpec:
    if not evidence.any(_BRIDGE):
        return BridgeSpec("none")
    if evidence.any(f"{_BRIDGE}linear."):
        return BridgeSpec("linear")
    compress = f"{_BRIDGE}x_embedder.proj"
    width = evidence.size(f"{compress}.weight 0", f"{compress}.bias 0", f"{_BRIDGE}blocks.0.attn.proj.bias 0")
    patch, across = (evidence.size(f"{compress}.weight {axis}") for axis in (2, 3))
    if patch != across:
        raise ValueError(f"its patches of {patch} x {across} codes are not square")
    kind, classes = "vit", 0
    if evidence.any(f"{_BRIDGE}y_embedder."):
        # One row without classes; otherwise a row per class and a last one for no class, which all published bridges
        # with classes have, since all of them drop classes in training.
        kind, classes = "dit", evidence.size(f"{_BRIDGE}y_embedder.embedding_table.weight 0") - 1
    return BridgeSpec(kind, width, patch, evidence.count(rf"{re.escape(_BRIDGE)}blocks\.(\d+)\."), classes)


class Evidence:
    """Answers questions about the names and shapes of the tensors in a checkpoint; `what` is what they should be."""

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str, what: str):
        self._shapes = {key: value.shape for key, value in tensors.items()}
        self._source = source
        self._what = what

    def any(self, prefix: str) -> bool:
        """Whether a name starts like this."""
        return any(key.startswith(prefix) for key in self._shapes)

    def count(self, pattern: str) -> int:
        """One more than the largest index that `pattern` finds in the names; 1 if it finds none."""
        return 1 + max((int(match[1]) for key in self._shapes if (match := re.match(pattern, key))), default=0)

    def size(self, *places: str) -> int:
        """The size that most of the existing `places` ("NAME AXIS") have; InputError if none exists or it is 0."""
        votes: collections.Counter[int] = collections.Counter()
        for place in places:
            key, axis = place.split()
            shape = self._shapes.get(key, ())
            if len(shape) > int(axis):
                votes[shape[int(axis)]] += 1
        size = votes.most_common(1)[0][0] if votes else 0
        if not size:
            raise InputError(f"{self._source} is no {self._what}: it lacks {places[0].split()[0]}, or that is empty")
        return size
