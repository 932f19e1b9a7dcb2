"""Registers of a group of warps, as NumPy arrays with one element per thread, and operands.

A group is one warp, or several that run in lockstep. Translating an instruction binds its operands
to arrays once (`Registers.source`, `Registers.target`); running it is then a NumPy call or two for
all threads of the group.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tests.ptx.parse import Operand, Program, UnknownPTXError

Array = NDArray
Run = Callable[[Array | None], object]  # runs an instruction for the threads of a mask; None: all

WARP = 32
UNSIGNED = {1: np.dtype(bool), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
DTYPES = {
    "pred": np.dtype(bool),
    **{f"{k}{8 * n}": np.dtype(f"u{n}") for k in "bu" for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"f{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
}
# Bits of every register that no instruction has written. A NaN in every floating-point format.
POISON = 0xFF


def dtype_of(kind: str) -> np.dtype:
    """NumPy's type for a PTX type."""
    if kind not in DTYPES:
        raise UnknownPTXError(f"type .{kind}")
    return DTYPES[kind]


class Registers:
    """Every register of a program for `threads` consecutive threads, the first being `first`."""

    def __init__(self, program: Program, first: int, threads: int) -> None:
        self.threads = threads
        names: dict[int, list[str]] = {width: [] for width in UNSIGNED}
        for name, width in program.registers.items():
            names[width].append(name)
        # One row per register.
        self.files = {
            width: np.zeros((len(of_width), threads), UNSIGNED[width])
            for width, of_width in names.items()
        }
        self.rows = {
            name: (width, row)
            for width, of_width in names.items()
            for row, name in enumerate(of_width)
        }
        self.constants: dict[tuple[int | float | bool, np.dtype], Array] = {}
        tid = np.arange(first, first + threads, dtype="u4")
        self.special = {"%tid.x": tid, "%laneid": tid % WARP, "%ntid.x": self.full(program.threads)}
        for axis in "xyz":
            self.special |= {f"%ctaid.{axis}": self.full(0), f"%nctaid.{axis}": self.full(0)}
        for axis in "yz":
            self.special |= {f"%tid.{axis}": self.full(0), f"%ntid.{axis}": self.full(1)}

    def full(self, value: int) -> Array:
        return np.full(self.threads, value, "u4")

    def poison(self) -> None:
        """Forget all values, as before a block's first instruction."""
        for file in self.files.values():
            file.view("u1").fill(POISON if file.dtype != bool else 0)

    def source(self, operand: Operand, dtype: np.dtype) -> Array:
        """The array that an operand names: a register, special register, symbol or constant."""
        assert isinstance(operand, str), operand
        if operand in self.rows:
            width, row = self.rows[operand]
            return narrowed(self.files[width][row], dtype)
        if operand in self.special:
            return narrowed(self.special[operand], dtype)
        if operand.startswith("!"):
            raise UnknownPTXError(operand)
        return self.constant(value_of(operand, dtype), dtype)

    def constant(self, value: int | float | bool, dtype: np.dtype) -> Array:
        key = (value, dtype)
        if key not in self.constants:
            self.constants[key] = np.full(self.threads, value, dtype)
            self.constants[key].flags.writeable = False
        return self.constants[key]

    def target(self, operand: Operand, dtype: np.dtype) -> Array:
        """The array of the register that an instruction writes.

        A register wider than `dtype` is returned as integers of its own width and dtype's kind, so
        that assigning to it extends the sign, or zeros.
        """
        assert isinstance(operand, str), operand
        if operand == "_":  # the result is not wanted
            return np.empty(self.threads, dtype)
        width, row = self.rows[operand]
        array = self.files[width][row]
        if array.dtype.itemsize == dtype.itemsize:
            return array.view(dtype)
        if array.dtype.itemsize < dtype.itemsize or dtype.kind not in "iu":
            raise UnknownPTXError(f"{dtype} in the {width}-bit register {operand}")
        return array.view(f"{dtype.kind}{array.dtype.itemsize}")

    def matrix_rows(self, operand: Operand) -> Array:
        """Rows of `files[32]` that a vector of 32-bit registers names."""
        assert isinstance(operand, tuple), operand
        widths, rows = zip(*(self.rows[name] for name in operand), strict=True)
        assert set(widths) == {32}, operand
        return np.array(rows)


def narrowed(array: Array, dtype: np.dtype) -> Array:
    """A register's low part as `dtype`, without copying."""
    if array.dtype.itemsize < dtype.itemsize:
        raise UnknownPTXError(f"{dtype} of a register of {array.dtype}")
    return array.view(dtype)[:: array.dtype.itemsize // dtype.itemsize]


def value_of(text: str, dtype: np.dtype) -> int | float | bool:
    """A constant operand (PTX ISA 4.5): 12, -1, 0xFF, 0f3F800000; global_smem is address 0."""
    if dtype.kind == "b":
        return int(text, 0) != 0
    if text.startswith(("0f", "0F", "0d", "0D")):
        raw = bytes.fromhex(text[2:])
        value = struct.unpack(">f" if text[1] in "fF" else ">d", raw)[0]
        bits = int.from_bytes(raw, "big")
        return value if dtype.kind == "f" else bits
    if text == "global_smem":
        return 0
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text) or dtype.kind == "f":
        raise UnknownPTXError(f"operand {text} of type {dtype}")
    bits = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
    signed = dtype.kind == "i" and bits >> (8 * dtype.itemsize - 1)
    return bits - (1 << 8 * dtype.itemsize) if signed else bits


def apply(function: np.ufunc, target: Array, *sources: Array) -> Run:
    """target = function(*sources), by a NumPy function that can write in place."""
    everywhere = partial(function, *sources, out=target)

    def run(mask: Array | None) -> None:
        if mask is None:
            everywhere()
        else:
            function(*sources, out=target, where=mask)

    return run


def assign(target: Array, compute: Callable[[], Array]) -> Run:
    """target = compute()."""

    def run(mask: Array | None) -> None:
        if mask is None:
            target[...] = compute()
        else:
            np.copyto(target, compute(), where=mask)

    return run
