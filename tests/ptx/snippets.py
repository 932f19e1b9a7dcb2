"""A few PTX instructions run by themselves, on registers that a test fills and reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx.machine import Group, smallest_access
from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.parse import Program, parse
from tests.ptx.registers import WARP, Array, Registers
from tests.ptx.transfers import Context

MODULE = """.visible .entry snippet(
	.param .u64 .ptr .global .align 1 snippet_param_0
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
{code}
	ret;
	// -- End function
}}
"""


def program(code: str, threads: int = WARP) -> Program:
    return parse(MODULE.format(threads=threads, code=code))


@dataclass
class Snippet:
    """Instructions after they have run."""

    group: Group

    def __getitem__(self, register: str) -> Array:
        """A register's raw bits, one element per thread."""
        width, row = self.group.context.registers.rows[register]
        return self.group.context.registers.files[width][row]


def run(
    code: str,
    registers: dict[str, Array | int] | None = None,
    threads: int = WARP,
    shared: Array | None = None,
) -> Snippet:
    """Run `code` for `threads` threads in lockstep.

    Args:
        registers: what registers hold first; arrays of any type of their width.
        shared: what shared memory holds first.
    """
    parsed = program(code, threads)
    raw = np.zeros(0, "u1") if shared is None else np.ascontiguousarray(shared).view("u1").ravel()
    memory = SharedMemory(max(len(raw), 64), smallest_access(parsed), threads // WARP)
    warp = (np.arange(threads) // WARP + 1).astype("u1")
    files = Registers(parsed, 0, threads)
    context = Context(files, GlobalMemory(), memory, warp, {}, set())
    group = Group(parsed, context)
    group.start_block((0, 0, 0), (1, 1, 1))
    if shared is not None:
        memory.data[: len(raw)] = raw
        memory.state.fill(1)
    for name, values in (registers or {}).items():
        width, row = files.rows[name]
        files.files[width][row] = np.asarray(values).view(files.files[width].dtype)
    with np.errstate(all="ignore"):
        for _ in group.execute():
            memory.barrier()
    return Snippet(group)


def lanes(values: Sequence[float], dtype: str) -> Array:
    """Values, repeated to fill a warp."""
    return np.resize(np.array(values, dtype), WARP)
