"""Pictures that cannot be read: why, how many of them a run passes over, and the error that ends it at one more."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fvq_jax.data.decode import UnreadableImageError, open_stored
from fvq_jax.data.record import Source
from fvq_jax.runtime.errors import InputError

# What a source or the decoder raises. OSError: the file has gone, or may not be read.
UNREADABLE = (OSError, UnreadableImageError)
MAX_UNREADABLE = 0.01  # the share, unless a config says another one
_ALWAYS = 10  # One percent of a small folder is less than one picture, and a single damaged one must not end a run.
_NAMED = 3  # in the message


@runtime_checkable
class Named(Protocol):
    """A source that names pictures by their paths below it."""

    def relative_name(self, index: int) -> str:
        """Path of picture `index`."""
        ...


def allowed(pictures: int, share: float | int) -> int:
    """How many of so many pictures may be unreadable: this share, and ten of them if that is more, but not over half.

    None may be if the share is 0.
    """
    return int(max(share * pictures, min(_ALWAYS, pictures // 2))) if share else 0


def too_many(found: Sequence[tuple[str, str]], pictures: int, share: float | int) -> InputError:
    """The error that ends a run; `found` are names of the unreadable pictures with reasons."""
    examples = ", ".join(f"{name!r} ({reason})" for name, reason in found[:_NAMED])
    return InputError(
        f"{len(found)} of {pictures} pictures are unreadable, and {allowed(pictures, share)} may be "
        f"(data.max_unreadable={share:g}): {examples}{', ...' if len(found) > _NAMED else ''}; raise "
        "data.max_unreadable, or repair or remove what is named here or in the log (python -m fvq_jax.data.prepare "
        "FOLDER OUT --check names all of a folder), and start again"
    )


def reason(source: Source, index: int) -> str:
    """Why a picture cannot be read. It is tried once more: workers hand on only its index."""
    try:
        open_stored(source[index]["image"])
    except UNREADABLE as error:
        return said(error)
    return "it could not be read before, but can now"


def said(error: Exception) -> str:
    """The words of one of UNREADABLE."""
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


def short_name(source: Source, index: int) -> str:
    """What to call a picture wherever its source lies: its path below the folder if there is one."""
    try:
        return source.relative_name(index) if isinstance(source, Named) else source.name(index)
    except UnreadableImageError:  # a damaged record of prepared pictures has lost its name
        return source.name(index)
