"""The errors a caller's input can cause, and the checks of single values that raise them.

Each is a `ValueError` whose message is one sentence: what is wrong, where, and what to do about it.
The command line prints that sentence and exits with status 2.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


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


def _is_finite(value: Any) -> bool:
    """True for finite real numbers, NumPy's too; False for booleans."""
    try:
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return is_real and math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


class Range(NamedTuple):
    """The numbers that a value may be: integers, or with `words` for messages any."""

    least: float = -math.inf
    most: float = math.inf
    words: str = ""
    optional: bool = False  # may be None

    def __str__(self) -> str:
        if self.words:
            return f"a number {self.words}"
        if self.most < math.inf:
            return f"an integer from {self.least:,} to {self.most:,}"
        return "an integer" if self.least == -math.inf else f"an integer of at least {self.least:,}"


def in_ranges(
    error: type[InputError], values: Mapping[str, Any], ranges: Mapping[str, Range]
) -> dict[str, Any]:
    """The values of these names as Python's own numbers, or `error` with the first that is wrong.

    Python's own, because NumPy's small integers wrap.
    """
    found: dict[str, Any] = {}
    for name, range_ in ranges.items():
        value = found[name] = values[name]
        if value is None and range_.optional:
            continue
        is_number = _is_finite(value) if range_.words else is_int(value)
        if not is_number or not range_.least <= value <= range_.most:
            raise error(f"{name} is {shown(value)}: it must be {range_}")
        found[name] = float(value) if range_.words else int(value)
    return found


def require_int(
    error: type[InputError], name: str, value: Any, least: int, most: float = math.inf
) -> int:
    """One value as Python's own int, or `error` with its range."""
    found: int = in_ranges(error, {name: value}, {name: Range(least, most)})[name]
    return found


def require_number(
    error: type[InputError], name: str, value: Any, range_: str, accept: Callable[[float], bool]
) -> None:
    """Raise `error`, naming the value and its range, unless it is a finite number that fits."""
    if not _is_finite(value) or not accept(value):
        raise error(f"{name} is {shown(value)}: it must be a number {range_}")


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
