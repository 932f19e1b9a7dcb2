"""Triton's interpreter in a third of the time.

At every launch, and at every call of a function inside a kernel, it searches all modules of
`triton.language` for the functions that it has to replace. Here each module is searched once.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import cache
from typing import Any

with suppress(ImportError):  # not on every platform
    import triton.language as tl
    from triton.runtime import interpreter

    @cache
    def builtins_of(module: Any) -> list[str]:
        return [name for name, x in inspect.getmembers(module) if tl.core.is_builtin(x)]

    def patch_builtin(module: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(module):
            member = getattr(module, name)
            if tl.core.is_builtin(member):  # not replaced already
                interpreter._patch_attr(module, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
