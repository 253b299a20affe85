"""How many flops of a training step XLA's count leaves out: it counts the body of a loop once."""

from fvq_jax.models.gpt import GPT, hidden_width
from fvq_jax.ops.causal_attention import scored_pairs
from fvq_jax.ops.token_loss import block_size, block_sizes, keeps_logits


def layer_flops(net: GPT, images: int) -> float:
    """Flops of one layer in a forward pass; matrix products only, a multiplication and an addition are two.

    Attention is counted over the pairs of positions whose score is computed.
    """
    width, hidden = net.width, net.hidden or hidden_width(net.width)
    weights = 4 * width**2 + 3 * width * hidden
    return 2.0 * images * (net.length * weights + 2 * scored_pairs(net.length) * width)


def head_flops(net: GPT, images: int) -> float:
    """Flops of the logits of all codes in a forward pass."""
    return 2.0 * images * net.length * net.vocab * net.width


def step_flops(net: GPT, images: int, parts: int = 1) -> float:
    """Flops of a training step over so many images: the forward pass and twice as much for the gradients.

    With `remat` the layers are computed once more. So are the logits, if there are too many of them to be kept.

    Args:
      net: the network.
      images: of a step.
      parts: into how many the images of a step are cut, by devices and micro-batches.
    """
    layers = (4 if net.remat else 3) * net.layers * layer_flops(net, images)
    return layers + _head_products(net, images, parts) * head_flops(net, images)


def uncounted_flops(net: GPT, images: int, devices: int, codebook: int, micro_batches: int = 1) -> float:
    """What a count with every loop body once leaves out of `step_flops`, over all devices and micro-batches.

    Counted are one layer of the loop, or with `unroll` all, and one block of tokens and codes of the loss.

    Args:
      net: the network.
      images: of a step.
      devices: of the mesh.
      codebook: size of the mesh's `codebook` axis, which divides the codes of the head.
      micro_batches: into how many parts the images of a step are cut.
    """
    parts = devices * micro_batches
    lengths = images * net.length // parts, net.vocab // codebook
    tokens, codes = map(block_size, lengths, block_sizes(net.width, net.dtype))
    block = _head_products(net, images, parts) * 2.0 * tokens * codes * net.width * parts
    layers = (net.layers if net.unroll else 1) * (4 if net.remat else 3) * layer_flops(net, images)
    return step_flops(net, images, parts) - layers - block


def _head_products(net, images, parts):
    """How many products of the size of the logits a step computes."""
    return 3 if keeps_logits(images * net.length // parts, net.vocab) else 4
