"""What the tokenizer and infilling are about to offer, in one place until they do.

Each function becomes the plain call that its docstring names, and then this file goes.
"""

from __future__ import annotations

from typing import Any

from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import Tokenizer


def origin(**names: str | None) -> dict[str, Any]:
    """`filename=filename, repository=repository` for `LLM.begin_infill`."""
    if any(name is not None for name in names.values()):
        raise InputError("--filename and --repository do not work yet: leave them out")
    return {}


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """`one.same_vocabulary(other)`."""
    compare = getattr(one, "same_vocabulary", None)
    return True if compare is None else compare(other)


def unknown_markers(tokenizer: Tokenizer, text: str) -> list[str]:
    """`tokenizer.unknown_markers(text)`."""
    find = getattr(tokenizer, "unknown_markers", None)
    return [] if find is None else find(text)


def min_tokens(tokenizer: Tokenizer, text: str) -> int:
    """`tokenizer.min_tokens(text)`."""
    bound = getattr(tokenizer, "min_tokens", None)
    return 0 if bound is None else bound(text)
