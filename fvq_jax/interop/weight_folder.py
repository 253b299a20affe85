"""Which file holds the weights in a folder of another program, such as a repository of Hugging Face."""

import re
from pathlib import Path

from fvq_jax.interop.named_tensors import ENDINGS
from fvq_jax.interop.safetensors_files import INDEX
from fvq_jax.runtime.errors import InputError, require

# The names that programs of Hugging Face give. Beside them lie other files of tensors, such as an optimizer's.
NAMES = (
    "model.safetensors",
    f"model{INDEX}",
    "diffusion_pytorch_model.safetensors",
    f"diffusion_pytorch_model{INDEX}",
    "pytorch_model.bin",
)
WEIGHT_ENDINGS = (*ENDINGS, ".bin", INDEX)
_PART = re.compile(r".*-\d{5}-of-\d{5}\.\w+")


def weights_in(folder: Path) -> Path | None:
    """The file of weights, or the index of its parts; None if there is nothing like it.

    One of `NAMES` comes before any other file. InputError if several come into question, which it names, and if there
    are only parts without an index.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.name.endswith(WEIGHT_ENDINGS) and path.is_file())
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    whole = [path for path in files if not _PART.fullmatch(path.name)]
    found = [path for path in whole if path.name in NAMES] or whole
    require(
        len(found) < 2,
        f"{folder} holds several files of weights: give the path of one of {', '.join(path.name for path in found)}",
    )
    require(
        bool(found or not files),
        f"{folder} holds parts of a file of weights, and not the index {NAMES[1]} that says what is in each",
    )
    return found[0] if found else None
