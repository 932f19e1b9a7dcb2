"""Checks of the lessons' exercises: `checks.lesson_1` holds those of lesson 1, and so on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Check = Callable[[Callable[..., Any]], str | None]

NOT_YET = "not yet: it returns None; write its body, and return the result"


def checker(**checks: tuple[Check, str]) -> Callable[[Callable[..., Any]], bool | None]:
    """`check(f)` for the exercises of a lesson.

    Args:
        checks: for each exercise, by the name of the function to be written, a function that takes
            the reader's function and returns None if it is right, else a sentence with a hint; and
            a sentence that says what the right answer means.

    Returns:
        A function that finds the check by `f.__name__`, prints one line and returns True if `f` is
        right, else None, which a notebook does not show. What `f` raises is part of that line.
    """

    def check(f: Callable[..., Any]) -> bool | None:
        name = getattr(f, "__name__", repr(f))
        if name not in checks:
            print(f"{name}: no exercise has this name; there are {', '.join(checks)}")
            return None
        verify, meaning = checks[name]
        hint = _hint(verify, f)
        print(f"{name}: right. {meaning}" if hint is None else f"{name}: {hint}")
        return True if hint is None else None

    return check


def _hint(verify: Check, f: Callable[..., Any]) -> str | None:
    """What is wrong with `f`, or None. A stub returns None, which would confuse any comparison."""
    returned_none = False

    @functools.wraps(f)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal returned_none
        result = f(*args, **kwargs)
        returned_none |= result is None
        return result

    try:
        hint = verify(watched)
    except AssertionError as error:  # of the check's torch.testing.assert_close
        hint = f"not yet: {_line(error)}"
    except Exception as error:
        hint = f"not yet: it raises {type(error).__name__}: {_line(error)}"
    return NOT_YET if hint is not None and returned_none else hint


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
