"""The errors a caller's input can cause, and the checks of single values that raise them.

Each is a `ValueError` whose message is one sentence: what is wrong, where, and what to do about it.
The command line prints that sentence and exits with status 2.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from typing import Any


class InputError(ValueError):
    """Something the caller supplied cannot be used; the base of the errors below."""


class ConfigError(InputError):
    """A model configuration that is malformed or that this architecture cannot run."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, unsafe, or not the model its config describes."""


class PromptError(InputError):
    """A prompt or a generation option that cannot be used."""


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxlong, _repr.maxother = 3, 120, 120, 120


def shown(value: Any) -> str:
    """A value from untrusted input for a message: quoted, escaped, at most 200 characters."""
    text = _repr.repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def is_int(value: Any) -> bool:
    """True for integers, NumPy's too; False for booleans."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for finite real numbers, NumPy's too; False for booleans."""
    try:
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return is_real and math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def require_int(
    error: type[InputError], name: str, value: Any, least: int, most: int | None = None
) -> int:
    """The value as Python's own int, whose arithmetic does not wrap, or `error` with its range."""
    if not is_int(value) or value < least or (most is not None and value > most):
        range_ = f"of at least {least:,}" if most is None else f"from {least:,} to {most:,}"
        raise error(f"{name} is {shown(value)}: it must be an integer {range_}")
    return int(value)


def require_text(name: str, value: Any) -> None:
    """Raise PromptError, naming the value, unless it is a str that UTF-8 can express."""
    if not isinstance(value, str):
        raise PromptError(f"{name} is of type {type(value).__name__}, not str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} holds a lone surrogate (U+{ord(value[error.start]):04X}) at character "
            f"{error.start}: it cannot be written as UTF-8; remove or replace it"
        ) from None
