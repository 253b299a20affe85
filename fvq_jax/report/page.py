"""The shell of every page: one file, `report/index.html`, that people can read and pass on by itself.

The page holds all its pictures and loads nothing from elsewhere; a content security policy inside it forbids that. Its
style and its one script are in `page.html`.
"""

import os
import string
from html import escape
from importlib import resources
from pathlib import Path

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.files import replace_whole
from fvq_jax.runtime.storage import REPORT

PAGE = "index.html"
TIMES = "\N{MULTIPLICATION SIGN}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
NONE = "\N{EN DASH}"


def shell(title: str, body: str) -> str:
    """A whole page as text; `body` is HTML, `title` is not."""
    template = string.Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=body)


def write_page(folder: str | os.PathLike[str], page: str) -> Path:
    """Writes `folder/report/index.html`, which appears once it is whole; returns its path.

    InputError if that cannot be written.
    """
    path = Path(folder) / REPORT / PAGE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_whole(path) as unfinished:
            unfinished.write_text(page, encoding="utf-8", errors="backslashreplace")  # names need not be text
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return path
