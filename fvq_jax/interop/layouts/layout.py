"""What a layout of published tokenizer files is, and the arrays of a network in it, both ways."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.evidence import Evidence
from fvq_jax.interop.layouts.conv_names import ConvNames
from fvq_jax.interop.layouts.quantizer_names import quantizer_name
from fvq_jax.interop.named_tensors import abstract_params, check_tensors
from fvq_jax.interop.torch_arrays import from_torch, to_torch, torch_shape
from fvq_jax.models.layers import levels_from_zero
from fvq_jax.models.quantizers import quantizer_settings
from fvq_jax.models.quantizers.base import Quantizer
from fvq_jax.models.tokenizer import TokenizerNet
from fvq_jax.runtime.errors import InputError, require
from fvq_jax.runtime.names import flatten, nest

Tensors = dict[str, np.ndarray]


def _unchanged(tensors: Mapping[str, np.ndarray], net: TokenizerNet) -> Tensors:
    return dict(tensors)


def _nothing(net: TokenizerNet, tensors: Mapping[str, np.ndarray]) -> Tensors:
    return {}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names, shapes and meaning of the tensors that one published program saves; a file of this folder makes one.

    Attributes:
      name: what users call it.
      title: what it holds, in a few words, for messages.
      convs: how encoder and decoder are named.
      quantizer: the kind of quantizer (its name in a config) that it holds.
      infer_quantizer: makes that from the tensors, and from what they do not tell: `l2_norm`, `depth`, `scales`;
        None if not known.
      marks: patterns of names; a file is in this layout if each is found at the start of a name.
      absent: patterns of which none may be found.
      quantizer_names: a pattern of the names of the quantizer's weights.
      unread: a pattern of names that are no weights of the tokenizer.
      bridged: whether it holds a bridge and the codebook before it; otherwise the bridge is folded for it.
      attention: whether it holds attention in any levels; otherwise in the lowest only.
      quant_kernels: the sides of the quantizer's convolutions that it holds.
      packed: makes the tensors of a file out of one tensor for every parameter.
      unpacked: the inverse.
      beside: further tensors that the published program expects in a file, made of the network and its weights.
      check: raises InputError if it cannot hold a network, or its parameters, for another reason.
      facts: what tensors do not tell about a network, to be written beside them.
      wrapper: where the tensors lie in a .pt file; "" if they are all it holds.
    """

    name: str
    title: str
    convs: ConvNames
    quantizer: str
    infer_quantizer: Callable[[Evidence, Mapping[str, Any]], Quantizer]
    marks: tuple[str, ...]
    quantizer_names: str
    absent: tuple[str, ...] = ()
    unread: str = r"(?!)"
    bridged: bool = False
    attention: bool = True
    quant_kernels: tuple[int, ...] = (1,)
    packed: Callable[[Mapping[str, np.ndarray], TokenizerNet], Tensors] = _unchanged
    unpacked: Callable[[Mapping[str, np.ndarray], TokenizerNet], Tensors] = _unchanged
    beside: Callable[[TokenizerNet, Mapping[str, np.ndarray]], Tensors] = _nothing
    check: Callable[[TokenizerNet, Mapping[str, Any]], None] = lambda net, params: None
    facts: Callable[[TokenizerNet], dict[str, Any]] = lambda net: {}
    wrapper: str = "model"

    def name_of(self, path: str, levels: int) -> str:
        """The name, before packing, of the parameter at `path` of a network with so many levels."""
        part, _, rest = path.partition("/")
        if part in ("encoder", "decoder"):
            return self.convs.name(path, levels)
        if part == "quantizer":
            return f"quantize.{quantizer_name(rest)}"
        return f"{part}.{'bias' if path.endswith('/bias') else 'weight'}"

    def network(self, tensors: Mapping[str, np.ndarray], said: Mapping[str, Any], source: str) -> TokenizerNet:
        """The network whose parameters the tensors are; computes in float32.

        Each number is the one on which most of the tensors that show it agree. So a tensor that is missing or has a
        wrong shape does not mislead, and `params` can name it.

        Args:
          tensors: by the names of the layout.
          said: what tensors do not tell, see `infer_quantizer`.
          source: what messages call the tensors.

        Raises:
          InputError: the network does not exist here.
        """
        evidence = Evidence(tensors, source, self.title)
        settings = self.convs.infer(evidence)
        quantizer = self.infer_quantizer(evidence, said)
        try:
            quantizer.check()
        except ValueError as error:
            raise InputError(f"{source} has a quantizer that does not exist here: {error}") from None
        kernels = evidence.sizes("quant_conv.weight 2", "post_quant_conv.weight 2")
        return TokenizerNet(quantizer, **settings, quant_kernel=kernels[0] if kernels else self.quant_kernels[0])

    def params(
        self,
        tensors: Mapping[str, np.ndarray],
        net: TokenizerNet,
        source: str,
        track: Callable[[Iterable[str]], Iterable[str]] = iter,
    ) -> dict[str, Any]:
        """The parameters of `net`, float32; what is `unread` is left out.

        All or nothing: InputError that lists every tensor that is missing, extra or of another shape (the first ten
        names and a count), naming `source`. `track` wraps the names, for a progress bar.
        """
        shapes, levels = {path: leaf.shape for path, leaf in flatten(abstract_params(net)).items()}, len(net.ch_mult)
        wanted = {
            self.name_of(path, levels): np.broadcast_to(np.float32(0), torch_shape(path, shape, _code_dim(net)))
            for path, shape in shapes.items()
        }
        weights = {name: value for name, value in tensors.items() if not re.fullmatch(self.unread, name)}
        packed = self.packed(wanted, net)
        check_tensors(weights, {name: value.shape for name, value in packed.items()}, source, self.title)
        plain = self.unpacked(weights, net)
        paths = {self.name_of(path, levels): path for path in shapes}
        return nest({paths[name]: from_torch(paths[name], plain[name], shapes[paths[name]]) for name in track(paths)})

    def tensors(self, net: TokenizerNet, params: Mapping[str, Any]) -> Tensors:
        """The parameters of `net` by the names of the layout, without `beside`.

        InputError, which says what would, if the layout cannot hold them.
        """
        self._check_network(net)
        self.check(net, params)
        levels, code_dim = len(net.ch_mult), _code_dim(net)
        plain = {
            self.name_of(path, levels): to_torch(path, np.asarray(value), code_dim)
            for path, value in flatten(params).items()
        }
        return self.packed(plain, net)

    def _check_network(self, net: TokenizerNet) -> None:
        kind, levels = quantizer_settings(net.quantizer)["name"], len(net.ch_mult)
        another = "choose another layout, or none, which writes a folder"
        require(
            kind == self.quantizer,
            f'the layout "{self.name}" holds {self.quantizer} quantizers only, and this one is {kind}: {another}',
        )
        require(
            self.attention or levels_from_zero(net.attention_levels, levels) == {levels - 1},
            f'the layout "{self.name}" has attention in the lowest level only, and this tokenizer in the levels '
            f"{net.attention_levels}: {another}",
        )
        require(
            net.quant_kernel in self.quant_kernels,
            f'the layout "{self.name}" has convolutions of side {self.quant_kernels[0]} beside its quantizer, and this '
            f"tokenizer of {net.quant_kernel}: {another}",
        )

    @property
    def pattern(self) -> str:
        """What the names of all weights match."""
        return rf"{self.convs.pattern}|(post_)?quant_conv\.(weight|bias)|{self.quantizer_names}"


def _code_dim(net: TokenizerNet) -> int:
    return net.quantizer.latent_dim
