"""Loads, stores, asynchronous copies, fences and waits, bound to a group of warps.

Source: PTX ISA 8.7, sections 9.7.9 (ld, st, prefetch, createpolicy, cp.async), 9.7.13 (barriers,
fences, griddepcontrol). Cache hints change no value and are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.memory import Buffer, GlobalMemory, SharedMemory
from tests.ptx.parse import Address, Instruction, Operand, UnknownPTXError
from tests.ptx.registers import Array, Registers, Run, assign, dtype_of

U1, U4, I8 = np.dtype("u1"), np.dtype("u4"), np.dtype("i8")
HINTS = {"global", "ca", "cg", "L1::evict_first", "L1::evict_last", "L2::cache_hint"}


@dataclass
class Copy:
    """One cp.async of some threads: shared addresses, what will arrive there, and its units."""

    address: Array
    data: Array  # (threads, bytes)
    units: Array
    warp: Array


@dataclass
class Context:
    """What the instructions of a group of warps refer to besides its registers."""

    registers: Registers
    memory: GlobalMemory
    shared: SharedMemory
    warp: Array  # each thread's warp number plus one
    parameters: dict[str, int]  # raw bits
    early: set[tuple[str, str]]  # ("reads" or "writes", buffer) before griddepcontrol.wait
    waited: bool = False
    open_copies: list[Copy] = field(default_factory=list)
    copy_groups: list[list[Copy]] = field(default_factory=list)

    def start_block(self) -> None:
        self.waited = False
        self.open_copies, self.copy_groups = [], []
        self.registers.poison()

    def touch(self, action: str, buffer: Buffer) -> None:
        if not self.waited:
            self.early.add((action, buffer.name))


def translate(i: Instruction, c: Context) -> Run | None:
    build = BUILDERS.get(i.name)
    return None if build is None else build(i, c)


def load(i: Instruction, c: Context) -> Run:
    """ld.{param,global,shared}[.v2|.v4]."""
    if i.modifiers[0] == "param":
        return load_parameter(i, c)
    space, count, dtype = layout(i)
    targets = [c.registers.target(x, dtype) for x in vector(i.operands[0])]
    assert len(targets) == count
    address = address_of(i.operands[1], c)
    size = dtype.itemsize

    def run(mask: Array | None) -> None:
        where, threads = address(mask)
        if space == "global":
            buffer, offset = c.memory.read(where, size * count)
            c.touch("reads", buffer)
            memory = buffer.view(size)
        else:
            c.shared.read(where, size * count, c.warp[threads])
            memory, offset = c.shared.views[size], where
        index = offset // size
        for k, target in enumerate(targets):
            target[threads] = memory[index + k].view(dtype)

    return run


def load_parameter(i: Instruction, c: Context) -> Run:
    symbol, dtype = i.operands[1], dtype_of(i.type)
    assert isinstance(symbol, Address)
    assert symbol.offset == 0
    mask = (1 << 8 * dtype.itemsize) - 1
    raw = np.dtype(f"u{dtype.itemsize}")
    return assign(
        c.registers.target(i.operands[0], dtype),
        lambda: np.array(c.parameters[symbol.base] & mask, raw).view(dtype),
    )


def store(i: Instruction, c: Context) -> Run:
    """st.{global,shared}[.v2|.v4]."""
    space, count, dtype = layout(i)
    raw = np.dtype(f"u{dtype.itemsize}")
    values = [c.registers.source(x, raw) for x in vector(i.operands[1])]
    assert len(values) == count
    address = address_of(i.operands[0], c)
    size = dtype.itemsize

    def run(mask: Array | None) -> None:
        where, threads = address(mask)
        data = np.stack([value[threads] for value in values], 1)
        if space == "global":
            buffer, offset = c.memory.write(where, size * count)
            c.touch("writes", buffer)
            buffer.view(size)[offset[:, None] // size + np.arange(count)] = data
        else:
            c.shared.write(where, data, c.warp[threads])

    return run


def layout(i: Instruction) -> tuple[str, int, np.dtype]:
    """Memory space, elements per thread, and their type."""
    spaces = [m for m in i.modifiers if m in ("global", "shared")]
    counts = [int(m[1]) for m in i.modifiers if m in ("v2", "v4")]
    unknown = set(i.modifiers[:-1]) - HINTS - {"shared", "v2", "v4"}
    if len(spaces) != 1 or unknown:
        raise UnknownPTXError(i.text)
    return spaces[0], counts[0] if counts else 1, np.dtype(dtype_of(i.type))


def vector(operand: Operand) -> tuple[str, ...]:
    assert not isinstance(operand, Address)
    return operand if isinstance(operand, tuple) else (operand,)


def address_of(
    operand: Operand, c: Context
) -> Callable[[Array | None], tuple[Array, Array | slice]]:
    """A function of the mask: the active threads' addresses, and which threads these are."""
    assert isinstance(operand, Address)
    width = c.registers.rows[operand.base][0] if operand.base in c.registers.rows else 32
    base = c.registers.source(operand.base, np.dtype(f"u{width // 8}"))
    offset = I8.type(operand.offset)

    def addresses(mask: Array | None) -> tuple[Array, Array | slice]:
        if mask is None:
            return base.astype(I8) + offset, slice(None)
        return base[mask].astype(I8) + offset, mask

    return addresses


def copy(i: Instruction, c: Context) -> Run:
    """cp.async: 4, 8 or 16 bytes from global to shared memory; or its commit and wait.

    The bytes arrive as late as they may: when the thread waits for their group. With a source size
    below the destination's, zeros follow.
    """
    if i.modifiers == ("async", "commit_group"):
        return whole_group(c, commit)
    if i.modifiers == ("async", "wait_group"):
        pending = int(str(i.operands[0]))
        return whole_group(c, lambda c: wait_for_copies(c, pending))
    if i.modifiers[0] != "async" or i.modifiers[2:] != ("shared", "global"):
        raise UnknownPTXError(i.text)
    target, origin = address_of(i.operands[0], c), address_of(i.operands[1], c)
    size = int(str(i.operands[2]), 0)
    filled = c.registers.source(i.operands[3] if len(i.operands) > 3 else str(size), U4)

    def run(mask: Array | None) -> None:
        where, threads = target(mask)
        source, _ = origin(mask)
        length = filled[threads]
        data = np.zeros((len(where), size), U1)
        reads = length > 0
        if not np.isin(length, (0, size)).all():
            raise UnknownPTXError(f"partial source size in {i.text}")
        if reads.any():
            buffer, offset = c.memory.read(source[reads], size)
            c.touch("reads", buffer)
            data[reads] = buffer.data[offset[:, None] + np.arange(size)]
        warp = c.warp[threads]
        units = c.shared.start_copy(where, size, warp)
        c.open_copies.append(Copy(where, data, units, warp))

    return run


def commit(c: Context) -> None:
    c.copy_groups.append(c.open_copies)
    c.open_copies = []


def wait_for_copies(c: Context, pending: int) -> None:
    """All but the latest `pending` groups arrive."""
    while len(c.copy_groups) > pending:
        for each in c.copy_groups.pop(0):
            c.shared.finish_copy(each.address, each.data, each.units, each.warp)


def whole_group(c: Context, action: Callable[[Context], None]) -> Run:
    """An instruction that the interpreter knows only with all threads of a group active."""

    def run(mask: Array | None) -> None:
        if mask is not None:
            raise UnknownPTXError("a wait or fence in divergent code")
        action(c)

    return run


def fence(i: Instruction, c: Context) -> Run:
    if i.modifiers[:2] != ("proxy", "async"):
        raise UnknownPTXError(i.text)
    return whole_group(c, lambda c: c.shared.fence())


def grid_dependency(i: Instruction, c: Context) -> Run:
    """griddepcontrol: .wait for the kernel before; .launch_dependents lets the next one start."""

    def wait(c: Context) -> None:
        c.waited = True

    def nothing(c: Context) -> None:
        pass

    return whole_group(c, {"wait": wait, "launch_dependents": nothing}[i.modifiers[0]])


def create_policy(i: Instruction, c: Context) -> Run:
    """createpolicy: a cache hint, of which any value will do."""
    return assign(c.registers.target(i.operands[0], np.dtype("u8")), lambda: np.zeros((), "u8"))


def prefetch(i: Instruction, c: Context) -> Run:
    """prefetch.global.L2: changes no value, but has to stay within a buffer all the same."""
    if i.modifiers[0] != "global":
        raise UnknownPTXError(i.text)
    address = address_of(i.operands[0], c)
    return lambda mask: c.memory.locate(address(mask)[0], 1)


@contextmanager
def naming(i: Instruction) -> Iterator[None]:
    """Errors inside name the instruction."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at {i}")
        raise


BUILDERS: dict[str, Callable[[Instruction, Context], Run]] = {
    "ld": load,
    "st": store,
    "cp": copy,
    "fence": fence,
    "griddepcontrol": grid_dependency,
    "createpolicy": create_policy,
    "prefetch": prefetch,
}
