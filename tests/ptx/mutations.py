"""Kernels broken on purpose in their PTX: what the interpreter does not notice is not proven.

Run where Triton compiles, with the cases of `cases.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.ptx import cases
from tests.ptx.memory import AccessError, RaceError

NOTICED = (AssertionError, AccessError, RaceError)
Case = tuple[str, dict[str, Any]]

# What is replaced, and by what.
MUTATIONS: dict[str, tuple[re.Pattern[str], str]] = {
    "without a barrier": (re.compile(r"bar\.sync\s+0;"), ""),
    "without waiting for copies": (re.compile(r"cp\.async\.wait_group\s+\d+;"), ""),
    "without waiting for products": (re.compile(r"wgmma\.wait_group\.sync\.aligned\s+\d+;"), ""),
    "without a fence of shared memory": (re.compile(r"fence\.proxy\.async\S*;"), ""),
    "without waiting for the kernel before": (re.compile(r"griddepcontrol\.wait;"), ""),
    "storing without a mask": (re.compile(r"@%p\d+ (?=st\.global)"), ""),
    "loading without a mask": (re.compile(r"@%p\d+ (?=ld\.global)"), ""),
}  # fmt: skip


def mutated(mutation: str, index: int, kernel: str, name: str, ptx: str) -> str:
    """PTX of `kernel` with the match of this index replaced; that of other kernels unchanged."""
    if name != kernel:
        return ptx
    pattern, replacement = MUTATIONS[mutation]
    match = list(pattern.finditer(ptx))[index]
    return ptx[: match.start()] + replacement + ptx[match.end() :]


def count(mutation: str, kernel: str, case: Case) -> int:
    """How many places of a kernel that a case launches can be mutated so."""
    found: list[int] = []

    def look(name: str, ptx: str) -> str:
        if name == kernel:
            found.append(len(MUTATIONS[mutation][0].findall(ptx)))
        return ptx

    cases.run(*case, rewrite=look)
    return found[0]


def unnoticed(mutation: str, kernel: str, case: Case) -> tuple[int, list[int]]:
    """How many places there are, and which of them may be mutated without being noticed."""
    total = count(mutation, kernel, case)
    rewrites = [partial(mutated, mutation, index, kernel) for index in range(total)]
    return total, [i for i, rewrite in enumerate(rewrites) if not is_noticed(rewrite, case)]


def is_noticed(rewrite: Callable[[str, str], str], case: Case) -> bool:
    try:
        cases.run(*case, rewrite=rewrite)
    except NOTICED:
        return True
    return False
