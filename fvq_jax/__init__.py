"""Image tokenizers with large, fully used codebooks (arXiv 2509.10140) in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvq_jax.pretrained import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
    """`Tokenizer`, imported when it is first used: JAX takes seconds, and not every use of the package needs it."""
    if name != "Tokenizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fvq_jax.pretrained import Tokenizer

    return Tokenizer
