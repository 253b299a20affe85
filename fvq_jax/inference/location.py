"""What the path of a tokenizer, generator or quantizer leads to: a file, or a folder of this package.

Instead of a path there may be the name of a repository of Hugging Face.
"""

import os
from pathlib import Path

from fvq_jax.interop.hub import download, repository
from fvq_jax.interop.weight_folder import weights_in
from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.paths import require_there
from fvq_jax.runtime.storage import CHECKPOINTS, CONFIG, split_step

WEIGHTS, BRIDGE = "weights.safetensors", "bridge.safetensors"  # in a folder that `save_pretrained` wrote


def locate(path: str | os.PathLike[str], what: str) -> tuple[Path, int | None]:
    """The file or folder that `path` leads to, and the step of a checkpoint that it names, or None.

    A folder that is none of this package's stands for the file of weights in it (`weight_folder`). A repository is
    downloaded, and then is such a folder.

    Args:
      path: a file, a folder, or WORKDIR/checkpoints/step_N. Or a repository of Hugging Face, `org/name` or
        `org/name@revision`, where there is nothing at that path, nor a folder `org`.
      what: what should be there, for messages.

    Raises:
      InputError: there is nothing, or no such checkpoint, or a folder with several files of weights; or the repository
        cannot be downloaded.
    """
    found, step = split_step(Path(path).expanduser())
    wanted = repository(str(path))
    # A slip in the path of a folder that is here asks nobody: the folder above it mostly exists.
    if wanted and not os.path.exists(found) and not os.path.exists(found.parent):
        try:
            found = download(wanted)
        except InputError as error:
            raise InputError(f"there is no {what} at {path}: the path does not exist, and {error}") from error
    found = require_there(found, what)
    if found.is_dir() and not any((found / name).exists() for name in (WEIGHTS, BRIDGE, CHECKPOINTS)):
        return weights_in(found) or found, None
    return found, step


def nothing_there(folder: Path, what: str) -> InputError:
    """The error for a folder that holds no tokenizer or generator."""
    return InputError(
        f"there is no {what} in the folder {folder}: it has neither {WEIGHTS} (a saved {what}) nor {CONFIG} and "
        f"{CHECKPOINTS}/ (a training workdir) nor a file of weights, such as model.safetensors"
    )
