"""SHA-256 checksums of the files of a folder, listed in that folder, so that a file that has changed is found.

The list has the format of `sha256sum`: `cd FOLDER && sha256sum --check SHA256SUMS` does the same by hand.
"""

import concurrent.futures
import hashlib
from collections.abc import Collection
from pathlib import Path

FILE = "SHA256SUMS"
_THREADS = 4  # hashing releases Python's lock, so that several files are hashed at once


def write_checksums(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Writes the checksums of all files now in `folder`, except `leave_out`, which may still change. Raises OSError."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != FILE and name not in leave_out]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        digests = threads.map(lambda name: _digest(folder / name), names)
        lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    (folder / FILE).write_text("".join(lines))


def find_damage(folder: Path) -> str:
    """Names the first listed file that is missing, changed or unreadable, and says which; empty if there is none.

    Files that are not listed are not checked. A folder without a list counts as undamaged.
    """
    if not (folder / FILE).exists():
        return ""
    try:
        lines = (folder / FILE).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return f"{FILE} cannot be read ({_reason(error)})"
    listed = [line.split("  ", 1) for line in lines]
    if not listed or any(len(pair) != 2 for pair in listed):
        return f"{FILE} is damaged"

    def check(pair: list[str]) -> str:
        digest, name = pair
        try:
            return "" if _digest(folder / name) == digest else f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({_reason(error)})"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return next(filter(None, threads.map(check, listed)), "")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
