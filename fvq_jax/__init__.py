"""Image tokenizers with large, fully used codebooks (arXiv 2509.10140) in JAX."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvq_jax.inference.generator import Generator
    from fvq_jax.inference.quantizer import load_quantizer
    from fvq_jax.inference.tokenizer import Tokenizer

if sys.argv[:1] == ["-m"]:  # python -m fvq_jax.PROGRAM, which is going to be looked for in this package
    from fvq_jax.runtime.starting import guard

    guard()

__all__ = ["Generator", "Tokenizer", "load_quantizer"]

_WHERE = {
    "Generator": "fvq_jax.inference.generator",
    "Tokenizer": "fvq_jax.inference.tokenizer",
    "load_quantizer": "fvq_jax.inference.quantizer",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: JAX takes seconds, and not every use of the package needs it."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
