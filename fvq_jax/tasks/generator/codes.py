"""The codes that a generator's config names, and whether they fit it."""

from typing import Literal

from ml_collections import ConfigDict

from fvq_jax.data.codes import CodeSource, open_codes
from fvq_jax.inference.tokenizer import Tokenizer
from fvq_jax.runtime.errors import require


def source_of(config: ConfigDict, split: Literal["train", "eval"]) -> CodeSource:
    """The codes of a split. InputError if they are missing, damaged, or do not fit the network of the config."""
    path, model = config.data[f"{split}_dir"], config.generator
    source = open_codes(path)
    info, grid = source.info, tuple(model.grid)
    require(
        len(info.grid) == 2,
        f"the codes of an image in {path} are {list(info.grid)}, and a generator takes codes [h, w]: use a tokenizer "
        "whose quantizer has no levels or scales",
    )
    require(
        tuple(info.grid) == grid,
        f"the codes in {path} have the grid {tuple(info.grid)}, and generator.grid is {grid}: set "
        f"--config.generator.grid={','.join(map(str, info.grid))}",
    )
    require(
        info.vocab in (0, model.vocab),
        f"the codes in {path} are from a vocabulary of {info.vocab}, and generator.vocab is {model.vocab}: set "
        f"--config.generator.vocab={info.vocab}",
    )
    require(
        info.classes <= model.classes,
        f"the codes in {path} have {info.classes} classes, and generator.classes is {model.classes}: set "
        f"--config.generator.classes={info.classes}",
    )
    return source


def check_tokenizer(config: ConfigDict, train: CodeSource, held_out: CodeSource) -> None:
    """Raises InputError unless both splits come from one tokenizer: that of `data.tokenizer`, if it is given.

    Codes in a layout that does not name its tokenizer are taken as they are.
    """
    ours, theirs = train.info.tokenizer, held_out.info.tokenizer
    require(
        not (ours and theirs) or ours == theirs,
        f"data.train_dir holds codes of the tokenizer {ours}, and data.eval_dir codes of {theirs}: extract both with "
        "the same one",
    )
    one, other = train.info.condition, held_out.info.condition
    require(
        not (one and other) or one == other,
        f"data.train_dir holds codes extracted with the condition {one!r}, and data.eval_dir with {other!r}: extract "
        "both alike",
    )
    path = config.data.tokenizer
    if not path:
        return
    given = Tokenizer.from_pretrained(path).fingerprint
    require(
        given == (ours or theirs or given),
        f"the codes in data.train_dir come from the tokenizer {ours or theirs}, and data.tokenizer {path} is {given}: "
        "extract codes with it, or name the one that they come from",
    )
