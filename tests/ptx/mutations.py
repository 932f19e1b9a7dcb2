"""Kernels broken on purpose in their PTX: what the interpreter does not notice is not proven.

Run where Triton compiles, with the cases of `cases.py`.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

from tests.ptx import cases
from tests.ptx.memory import AccessError, RaceError

NOTICED = (AssertionError, AccessError, RaceError)
Case = tuple[str, dict[str, Any]]


class Mutation(NamedTuple):
    """What is replaced, and by what.

    Attributes:
        trap: of a mask, a replacement that fails if the mask holds back any thread. Deleting one
            that holds back none changes nothing.
    """

    pattern: re.Pattern[str]
    replacement: str = ""
    trap: str = ""


FAR = 1 << 62  # bytes, to where no memory is
ACCESS = r"@(%p\d+) ({}\.global[^;]*\[ *(%rd\d+)[^;]*;)"
ACCESS_TRAP = rf"@!\1 prefetch.global.L2 [\3 + {FAR}]; \g<0>"
# A copy's mask is its source's size: 0 reads nothing and writes zeros.
COPY = r"(@!?%p\d+ )?(cp\.async\.c[ag]\.shared\.global [^;]*(%rd\d+)[^;]*), (%r\d+);"
COPY_TRAP = rf"""
.reg .pred %empty0;
setp.eq.s32 %empty0, \4, 0; @%empty0 prefetch.global.L2 [\3 + {FAR}]; \g<0>"""

MUTATIONS = {
    name: Mutation(re.compile(pattern), *replacements)
    for name, (pattern, *replacements) in {
        "without a barrier": (r"bar\.sync\s+0;",),
        "without waiting for copies": (r"cp\.async\.wait_group\s+\d+;",),
        "without waiting for products": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;",),
        "without a fence of shared memory": (r"fence\.proxy\.async\S*;",),
        "without waiting for the kernel before": (r"griddepcontrol\.wait;",),
        "storing without a mask": (ACCESS.format("st"), r"\2", ACCESS_TRAP),
        "loading without a mask": (ACCESS.format("ld"), r"\2", ACCESS_TRAP),
        "copying without a mask": (COPY, r"\1\2;", COPY_TRAP),
    }.items()
}


class Seen(Exception):  # noqa: N818
    """Ends a case where its kernel would run."""


def count(mutation: str, kernel: str, case: Case) -> int:
    """How many places of a kernel that a case launches can be mutated so."""

    def look(name: str, ptx: str) -> str:
        if name == kernel:
            raise Seen(len(MUTATIONS[mutation].pattern.findall(ptx)))
        return ptx

    try:
        cases.run(*case, rewrite=look)
    except Seen as seen:
        return int(seen.args[0])
    raise ValueError(f"{case} does not launch {kernel}")


def mutate(mutation: str, kernel: str, case: Case) -> tuple[int, list[int]]:
    """How many places can be mutated, masks only where they hold back a thread; and which of them
    (by their order in the PTX) without being noticed."""
    pattern, replacement, trap = MUTATIONS[mutation]
    places = list(range(count(mutation, kernel, case)))

    def is_noticed(index: int, replacement: str) -> bool:
        try:
            cases.run(*case, rewrite=partial(replaced, pattern, index, replacement, kernel))
        except NOTICED:
            return True
        return False

    if trap:
        places = [index for index in places if is_noticed(index, trap)]
    return len(places), [index for index in places if not is_noticed(index, replacement)]


def replaced(
    pattern: re.Pattern[str], index: int, replacement: str, kernel: str, name: str, ptx: str
) -> str:
    """PTX of `kernel` with the match of this index replaced; that of other kernels unchanged."""
    if name != kernel:
        return ptx
    match = list(pattern.finditer(ptx))[index]
    return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]
