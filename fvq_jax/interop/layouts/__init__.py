"""The layouts of published tokenizer files, a file each; `LAYOUTS` is the table of all of them."""

import re
from collections.abc import Collection

from fvq_jax.interop.layouts.fvq import FVQ, FVQ_RQ
from fvq_jax.interop.layouts.ibq import IBQ
from fvq_jax.interop.layouts.layout import Layout
from fvq_jax.interop.layouts.lfq import LFQ
from fvq_jax.interop.layouts.llamagen import LLAMAGEN
from fvq_jax.interop.layouts.refused import REFUSED
from fvq_jax.interop.layouts.rq_vae import RQ_VAE
from fvq_jax.interop.layouts.taming import TAMING
from fvq_jax.interop.layouts.var import FVQ_VAR, VAR
from fvq_jax.runtime.errors import InputError, require

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (LLAMAGEN, FVQ, FVQ_RQ, FVQ_VAR, TAMING, VAR, IBQ, RQ_VAE, LFQ)
}
SHOWN = 3  # names in the message about a file that is not recognised


def recognised(names: Collection[str]) -> bool:
    """Whether tensors of these names are in one of the layouts, or are those of a relative that is refused."""
    return _layout(names) is not None or any(_found(patterns, names) for patterns in REFUSED)


def _found(patterns: Collection[str], names: Collection[str]) -> bool:
    """Whether each pattern is at the start of a name."""
    return all(any(re.match(pattern, name) for name in names) for pattern in patterns)


def _layout(names: Collection[str]) -> Layout | None:
    for layout in LAYOUTS.values():
        if _found(layout.marks, names) and not any(_found((pattern,), names) for pattern in layout.absent):
            return layout
    return None


def layout_of(names: Collection[str], source: str, chosen: str | None = None) -> Layout:
    """The layout that tensors of these names are in: the one of the name `chosen`, or else the one that is recognised.

    InputError if there is none. Its message, one line, says why a relative is refused, or names the closest layout and
    the first tensors that differ.
    """

    for patterns, reason in REFUSED.items():
        if _found(patterns, names):
            raise InputError(f"{source} is {reason}")
    if chosen is not None:
        require(chosen in LAYOUTS, f"there is no layout {chosen!r}: use one of {', '.join(LAYOUTS)}")
        return LAYOUTS[chosen]
    if (known_layout := _layout(names)) is not None:
        return known_layout

    def likeness(layout: Layout) -> tuple[int, int]:
        lacking = sum(not _found((mark,), names) for mark in layout.marks)
        return sum(bool(re.fullmatch(layout.pattern, name)) for name in names), -lacking

    closest = max(LAYOUTS.values(), key=likeness)
    known = [name for name in names if re.fullmatch(closest.pattern, name)]
    read = f"{source} is in none of the layouts that are read ({', '.join(LAYOUTS)})"
    if not known:
        raise InputError(f"{read}, nor like one: its first tensors are {_first(names)}")
    foreign = [name for name in names if not re.fullmatch(f"{closest.pattern}|{closest.unread}", name)]
    lacking = [mark for mark in closest.marks if not _found((mark,), names)]
    differences = [f"lacks {_first([mark.replace(chr(92), '') for mark in lacking])}"] if lacking else []
    differences += [f"has {_first(foreign)} besides"] if foreign else []
    raise InputError(
        f"{read}; closest is {closest.name} ({closest.title}; {len(known)} of {len(known) + len(foreign)} tensors): "
        f"it {' and '.join(differences)}"
    )


def _first(names: Collection[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
