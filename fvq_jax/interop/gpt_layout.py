"""Weights of the class-conditional generator in LlamaGen's published layout: names, shapes, and the arrays both ways.

PyTorch keeps linear layers as [out, in] and every layer in tensors of its own; here they are [in, out], and all layers
are stacked along a first axis. `gpt_checkpoint` reads and writes files.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fvq_jax.interop.evidence import Evidence
from fvq_jax.interop.named_tensors import check_tensors
from fvq_jax.models.gpt import GPT, SIZES, hidden_width
from fvq_jax.runtime.errors import InputError

CLASS_DROPOUT = 0.1  # of every published model
IMAGENET_CLASSES = 1000

_TABLES = {
    "cls_embedding": "cls_embedding.embedding_table.weight",
    "tok_embedding": "tok_embeddings.weight",
    "norm": "norm.weight",
    "output": "output.weight",
}
_LAYER = {
    "wqkv": "attention.wqkv.weight",
    "wo": "attention.wo.weight",
    "w1": "feed_forward.w1.weight",
    "w3": "feed_forward.w3.weight",
    "w2": "feed_forward.w2.weight",
    "attention_norm": "attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
}
# A pattern of all names.
NAMES = "|".join(map(re.escape, _TABLES.values())) + rf"|layers\.\d+\.({'|'.join(map(re.escape, _LAYER.values()))})"


def infer_gpt(
    tensors: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    source: str = "the checkpoint",
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    classes: int | None = None,
) -> GPT:
    """The network whose parameters `tensors` are (published names); computes in float32.

    Layers, widths and the vocabulary follow from shapes, and so do the heads of the published sizes B to 3B. What
    shapes do not tell comes from the keywords, or else from `facts`, the arguments of the model or of the training
    program that a file may hold: `n_head`; `grid`, `block_size`, or `image_size` and `downsample_size`; `num_classes`
    and `class_dropout_prob`; `rope_base`; `norm_eps`.

    The table of classes has a last row for "no class" if the model was trained with class dropout. Without it
    `class_dropout` of the network is 0, and guidance has nothing to compare with. Where nothing says how many classes
    there are, a table of 1,000 rows is taken for those of ImageNet without that row, and any other table to have it.

    Raises:
      InputError: the tensors belong to no class-conditional generator, or heads, grid or classes are unknown or do not
        fit; names `source`.
    """
    if any(name.startswith(("cls_embedding.cap_proj.", "cls_embedding.uncond_embedding")) for name in tensors):
        raise InputError(f"{source} is a text-conditional model (t2i); only class-conditional ones (c2i) are read")
    evidence = Evidence(tensors, source, "class-conditional LlamaGen generator")
    vocab = evidence.size("tok_embeddings.weight 0", "output.weight 0")
    width = evidence.size("tok_embeddings.weight 1", "output.weight 1", "norm.weight 0", "layers.0.ffn_norm.weight 0")
    places = ("w1.weight 0", "w3.weight 0", "w2.weight 1")
    hidden = evidence.size(*(f"layers.0.feed_forward.{place}" for place in places))
    layers = evidence.count(r"layers\.(\d+)\.")
    published = [size.heads for size in SIZES.values() if (size.layers, size.width) == (layers, width)]
    heads = _whole(facts, "n_head") if heads is None else heads
    heads = next(iter(published), None) if heads is None else heads
    grid = _grid(facts, source) if grid is None else grid
    unknown = []
    if heads is None:
        unknown.append(f"heads=N, since {layers} layers of width {width} are no published size ({', '.join(SIZES)})")
    if grid is None:
        unknown.append("grid=(rows, columns) of codes, published: (16, 16) for 256 pixels, (24, 24) for 384")
    if heads is None or grid is None:
        raise InputError(f"{source} does not say everything about its network: give {' and '.join(unknown)}")
    if heads < 1 or width % heads or width // heads % 4:
        raise InputError(
            f"{source} has width {width}, which {heads} heads do not divide into widths that are multiples of 4"
        )
    if min(grid) < 1:
        raise InputError(f"the grid of {source} must be rows and columns of codes, not {grid}")
    rows = evidence.size("cls_embedding.embedding_table.weight 0")
    classes, class_dropout = _classes(rows, classes, facts, source)
    return GPT(
        vocab=vocab,
        classes=classes,
        grid=grid,
        layers=layers,
        width=width,
        heads=heads,
        hidden=0 if hidden == hidden_width(width) else hidden,
        class_dropout=class_dropout,
        rope_base=float(facts.get("rope_base", GPT.rope_base)),
        eps=float(facts.get("norm_eps", GPT.eps)),
    )


def gpt_facts(net: GPT) -> dict[str, Any]:
    """What tensors do not tell about `net`, by the names of the published model's arguments, and its `grid`."""
    return {
        "dim": net.width,
        "n_layer": net.layers,
        "n_head": net.heads,
        "vocab_size": net.vocab,
        "block_size": net.length,
        "num_classes": net.classes,
        "class_dropout_prob": float(net.class_dropout),
        "norm_eps": net.eps,
        "rope_base": net.rope_base,
        "grid": list(net.grid),
    }


def torch_shapes(net: GPT) -> dict[str, tuple[int, ...]]:
    """The published name and shape of every tensor of `net`."""
    d, f = net.width, net.hidden or hidden_width(net.width)
    tables = {
        "cls_embedding": (_class_rows(net), d),
        "tok_embedding": (net.vocab, d),
        "norm": (d,),
        "output": (net.vocab, d),
    }
    layer: dict[str, tuple[int, ...]] = {"wqkv": (3 * d, d), "wo": (d, d), "w1": (f, d), "w3": (f, d), "w2": (d, f)}
    layer |= {"attention_norm": (d,), "ffn_norm": (d,)}
    return {_TABLES[name]: shape for name, shape in tables.items()} | {
        f"layers.{number}.{_LAYER[name]}": shape for number in range(net.layers) for name, shape in layer.items()
    }


def gpt_tensors(net: GPT, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of `net` by published name; views where that is possible."""
    tensors = {torch: np.asarray(params[name]) for name, torch in _TABLES.items()}
    tensors[_TABLES["cls_embedding"]] = tensors[_TABLES["cls_embedding"]][: _class_rows(net)]
    for name, torch in _LAYER.items():
        for number, value in enumerate(np.asarray(params["layers"][name])):
            tensors[f"layers.{number}.{torch}"] = value.T
    return tensors


def gpt_params(
    tensors: Mapping[str, np.ndarray],
    net: GPT,
    source: str = "the checkpoint",
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Parameters of `net`, float32 on the host, nested as the module nests them.

    All or nothing: InputError that lists every tensor that is missing, extra or of another shape (the first ten names
    and a count), naming `source`. The row of "no class" that a model without class dropout lacks is zero. `track` wraps
    the names, for a progress bar.
    """
    shapes = torch_shapes(net)
    check_tensors(tensors, shapes, source, "generator")
    targets: dict[str, np.ndarray] = {}
    params: dict[str, Any] = {"layers": {}}
    for name, torch in _TABLES.items():
        rows = (net.classes + 1,) if name == "cls_embedding" else shapes[torch][:1]
        params[name] = np.zeros((*rows, *shapes[torch][1:]), np.float32)
        targets[torch] = params[name][: shapes[torch][0]]
    for name, torch in _LAYER.items():
        stacked = np.empty((net.layers, *shapes[f"layers.0.{torch}"][::-1]), np.float32)
        params["layers"][name] = stacked
        targets |= {f"layers.{number}.{torch}": stacked[number].T for number in range(net.layers)}
    for torch in track(targets):
        targets[torch][...] = tensors[torch]
    return params


def _class_rows(net: GPT) -> int:
    """Rows of the published table of classes: without class dropout it has none for "no class"."""
    return net.classes + (net.class_dropout > 0)


def _classes(rows: int, classes: int | None, facts: Mapping[str, Any], source: str) -> tuple[int, float]:
    """How many classes a table of `rows` rows is for, and the class dropout, which is 0 without "no class"."""
    said = facts.get("class_dropout_prob")
    if classes is None:
        without = said is not None and float(said) == 0
        classes = _whole(facts, "num_classes") or (
            rows if without or (said is None and rows == IMAGENET_CLASSES) else rows - 1
        )
    if classes < 1 or rows not in (classes, classes + 1):
        raise InputError(
            f"{source} has {rows} rows in its table of classes; {classes} classes need {classes}, "
            f"or {classes + 1} with the one for no class"
        )
    return classes, float(said or CLASS_DROPOUT) if rows > classes else 0.0


def _grid(facts: Mapping[str, Any], source: str) -> tuple[int, int] | None:
    """Rows and columns of codes as a file says, None if it does not."""
    if facts.get("grid"):
        rows, columns = map(int, facts["grid"])
        return rows, columns
    if length := _whole(facts, "block_size"):
        side = math.isqrt(length)
        if side * side != length:
            raise InputError(f"{source} has {length} codes, which are no square: give grid=(rows, columns)")
        return side, side
    if (pixels := _whole(facts, "image_size")) and (factor := _whole(facts, "downsample_size")):
        return pixels // factor, pixels // factor
    return None


def _whole(facts: Mapping[str, Any], name: str) -> int | None:
    """A whole number above 0 among the facts, None without."""
    value = facts.get(name)
    return int(value) if value else None
