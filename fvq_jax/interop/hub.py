"""Repositories of Hugging Face by name. `huggingface_hub`, which need not be installed, downloads their weights."""

import re
from pathlib import Path
from typing import NamedTuple

from absl import logging

from fvq_jax.interop.weight_folder import WEIGHT_ENDINGS
from fvq_jax.runtime.errors import InputError

INSTALL = "pip install 'fvq_jax[hub]'"
_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)
_LENGTH = 300  # of what an error of the library says


class Repository(NamedTuple):
    """The name of a repository, `org/name`, and a branch, tag or commit of it; None is the newest state."""

    name: str
    revision: str | None


def repository(text: str) -> Repository | None:
    """What `org/name` or `org/name@revision` names; None for text of any other form, and for the path of a file."""
    found = _NAME.fullmatch(text)
    return Repository(found[1], found[2]) if found and not found[1].endswith(WEIGHT_ENDINGS) else None


def download(wanted: Repository) -> Path:
    """A folder with the weights and the config.json of a repository, as they are in its top folder.

    What is in the library's cache already is not downloaded again. The library's environment variables say where the
    cache is, which server is asked, with which token, and whether it may be asked at all. InputError if the library is
    missing, or if it cannot get the files.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise InputError(f"a repository of Hugging Face is downloaded by huggingface_hub: {INSTALL}") from None
    name, revision = wanted
    patterns = ["config.json", *(f"*{ending}" for ending in WEIGHT_ENDINGS)]
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} needs a consent first: give it at https://huggingface.co/{name}, and log in"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"Hugging Face has no repository {name}, or a private one: log in if it is yours") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"the repository {name} of Hugging Face has no revision {revision}") from error
    except Exception as error:  # of the network, of the disk, of the library's checks of names
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_LENGTH]
        raise InputError(f"cannot download the repository {name} of Hugging Face: {reason}") from error
    logging.info("%s of Hugging Face is in %s", name, folder)
    return Path(folder)
