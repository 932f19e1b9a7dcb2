"""Tensor-core instructions: ldmatrix, stmatrix, mma.sync and wgmma, for all warps of a group.

Source: PTX ISA 8.7, sections 9.7.14.5 (mma and its fragments, ldmatrix, stmatrix) and 9.7.15
(asynchronous warpgroup instructions: fragments, matrix descriptors, swizzling).

A fragment spreads a matrix over a warp: thread 4 g + c holds, in register (k, h), the elements
2c and 2c + 1 of row 8h + g in the k-th group of 8 columns. So a transposition turns registers into
matrices (`a_matrix`, `accumulators`) and back. Products are exact and their sums are rounded once;
hardware keeps fewer bits while it sums.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tests.ptx.arithmetic import SHORT_FLOATS
from tests.ptx.memory import SEVERAL, RaceError
from tests.ptx.parse import Instruction, UnknownPTXError
from tests.ptx.registers import WARP, Array, Run
from tests.ptx.transfers import Context, address_of, vector

U2, U4, F4, F8 = (np.dtype(x) for x in ("u2", "u4", "f4", "f8"))
IN_FLIGHT = np.uint32(0xFFFFFFFF)  # NaN, in accumulators that are not to be read yet
SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}  # bytes per row of an atom, bits that are mixed in


@dataclass
class Product:
    """A wgmma in flight: where its result goes, and what must not change until it is waited for."""

    target: Array  # rows of the register file
    result: Array  # their values
    units: list[tuple[Array, Array | int]]  # shared memory, and which warps read it
    rows: Array | None  # registers that hold A
    a: Array | None  # what they held
    text: str


@dataclass
class TensorCores:
    """The wgmma instructions of a group that have not been waited for."""

    open: list[Product] = field(default_factory=list)
    groups: list[list[Product]] = field(default_factory=list)

    def in_flight(self) -> list[Product]:
        return [product for group in self.groups for product in group] + self.open


def translate(i: Instruction, c: Context, tensor: TensorCores) -> Run | None:
    if i.name == "wgmma":
        run = WGMMA[i.modifiers[0]](i, c, tensor)
    elif i.name in BUILDERS:
        run = BUILDERS[i.name](i, c)
    else:
        return None

    def whole(mask: Array | None) -> None:
        if mask is not None:
            raise UnknownPTXError(f"in divergent code: {i.text}")
        run(None)

    return whole


# --- fragments ---------------------------------------------------------------------------------


def a_matrix(registers: Array, load: Callable[[Array], Array]) -> Array:
    """A (warps, 16, 16) of four registers (4, threads) with two 16-bit floats each."""
    parts = load(registers.view(U2)).reshape(2, 2, -1, 8, 4, 2)  # k, h, warp, g, c, element
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def b_matrix(registers: Array, load: Callable[[Array], Array]) -> Array:
    """B (warps, 16, 8) of two registers (2, threads): like A transposed, with one row group."""
    parts = load(registers.view(U2)).reshape(2, -1, 8, 4, 2)  # k, warp, g, c, element
    return parts.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)


def accumulators(registers: Array) -> Array:
    """C or D (warps, 16, N) of N / 2 float32 registers (N / 2, threads)."""
    groups = len(registers) // 4
    parts = registers.reshape(groups, 2, 2, -1, 8, 4)  # k, h, element, warp, g, c
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, 8 * groups)


def to_registers(matrix: Array) -> Array:
    """The inverse of `accumulators`: (N / 2, threads)."""
    warps, _, N = matrix.shape
    parts = matrix.reshape(warps, 2, 8, N // 8, 4, 2)  # warp, h, g, k, c, element
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(N // 2, warps * WARP)


def mma(i: Instruction, c: Context) -> Run:
    """D = A B + C, m16n8k16 of 16-bit floats with float32 sums."""
    kinds = i.modifiers[-4:]
    shape = ("sync", "aligned", "m16n8k16", "row", "col")
    if i.modifiers[:5] != shape or kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2]:
        raise UnknownPTXError(i.text)
    load = SHORT_FLOATS[kinds[1]][0]
    d, a, b, acc = (c.registers.matrix_rows(x) for x in i.operands)
    file = c.registers.files[32]

    def run(_: Array | None) -> None:
        left, right = a_matrix(file[a], load).astype(F8), b_matrix(file[b], load).astype(F8)
        total = np.matmul(left, right) + accumulators(file[acc].view(F4))
        file[d] = to_registers(total.astype(F4)).view(U4)

    return run


# --- matrices in shared memory -----------------------------------------------------------------


def ldmatrix(i: Instruction, c: Context) -> Run:
    """ldmatrix: 8x8 matrices of 16-bit elements; lane 8k + r holds the address of row r of the kth.

    Register k of thread 4g + c gets elements 2c and 2c + 1 of row g, or of column g with .trans.
    """
    count, transposed = matrices(i)
    address = address_of(i.operands[1], c)
    targets = c.registers.matrix_rows(i.operands[0])
    lanes = active_lanes(c, count)

    def run(_: Array | None) -> None:
        where = address(None)[0][lanes]
        c.shared.read(where, 16, c.warp[lanes])
        rows = c.shared.views[2][where[:, None] // 2 + np.arange(8)]
        tiles = rows.reshape(-1, count, 8, 8)  # warp, k, row, column
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        pairs = np.ascontiguousarray(tiles.swapaxes(0, 1)).view(U4)  # k, warp, g, c
        c.registers.files[32][targets] = pairs.reshape(count, -1)

    return run


def stmatrix(i: Instruction, c: Context) -> Run:
    """stmatrix: the inverse of ldmatrix."""
    count, transposed = matrices(i)
    address = address_of(i.operands[0], c)
    values = c.registers.matrix_rows(vector(i.operands[1]))
    lanes = active_lanes(c, count)

    def run(_: Array | None) -> None:
        where = address(None)[0][lanes]
        pairs = c.registers.files[32][values].reshape(count, -1, 8, 4)  # k, warp, g, c
        tiles = pairs.view(U2).swapaxes(0, 1)  # warp, k, row, column
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        c.shared.write(where, np.ascontiguousarray(tiles).reshape(-1, 8), c.warp[lanes])

    return run


def matrices(i: Instruction) -> tuple[int, bool]:
    """How many matrices, and whether they are transposed."""
    match = re.fullmatch(
        r"sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", ".".join(i.modifiers)
    )
    if match is None:
        raise UnknownPTXError(i.text)
    return int(match[1]), bool(match[2])


def active_lanes(c: Context, count: int) -> Array:
    """The threads whose addresses count: the first 8 per matrix of each warp."""
    threads = np.arange(c.registers.threads)
    return threads[threads % WARP < 8 * count]


# --- wgmma -------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def descriptor_offsets(descriptor: int, rows: int, transposed: bool) -> Array:
    """Byte addresses (rows, 16) of a matrix in shared memory, by its descriptor (9.7.15.5.1).

    Rows are those of A, or the columns of B; the 16 elements run along K. An atom has 8 rows of
    `width` bytes, in which 16-byte pieces are permuted by address bits 7 and up (the swizzle).
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise UnknownPTXError("a matrix descriptor with a base offset")
    if descriptor >> 62 not in SWIZZLES:
        raise UnknownPTXError("a matrix without swizzle")
    width, bits = SWIZZLES[descriptor >> 62]
    row, k = np.arange(rows)[:, None], np.arange(16)
    if transposed:  # K is the slow axis: an atom has 8 steps of K, `width` bytes of rows each
        per_atom = width // 2
        address = (
            start + row // per_atom * leading + k // 8 * stride + k % 8 * width
            + row % per_atom * 2
        )  # fmt: skip
    else:
        address = start + row // 8 * stride + row % 8 * width + k * 2
    return address ^ ((address >> 7 & bits) << 4)


@lru_cache(maxsize=4096)
def descriptor_units(descriptor: int, rows: int, some: range, transposed: bool, unit: int) -> Array:
    """The units of shared memory that hold some rows of a matrix, each once."""
    addresses = descriptor_offsets(descriptor, rows, transposed)[some.start : some.stop]
    return np.unique(addresses // unit)


def mma_async(i: Instruction, c: Context, tensor: TensorCores) -> Run:
    """wgmma.mma_async: D = A B (+ D), m64nNk16, each warp 16 of the 64 rows.

    Executed at once, but its registers hold NaN until it is waited for, and what it reads must not
    change until then.
    """
    match = re.fullmatch(r"m64n(\d+)k16", i.modifiers[3])
    d_kind, a_kind, b_kind = i.modifiers[-3:]
    from_registers = isinstance(i.operands[1], tuple)
    scale_d, *signs = i.operands[3:6]
    if not match or d_kind != "f32" or a_kind != b_kind or signs != ["1", "1"]:
        raise UnknownPTXError(i.text)
    N, load = int(match[1]), SHORT_FLOATS[a_kind][0]
    r = c.registers
    file, target = r.files[32], r.matrix_rows(i.operands[0])
    transpose_a = not from_registers and i.operands[6] != "0"
    transpose_b = i.operands[-1] != "0"
    a_rows = r.matrix_rows(i.operands[1]) if from_registers else None
    a_descriptor = None if from_registers else r.source(i.operands[1], np.dtype("u8"))
    b_descriptor = r.source(i.operands[2], np.dtype("u8"))
    accumulate = r.source(scale_d, np.dtype(bool))
    place = (c.warp[::WARP] - 1) % 4  # of each warp in its warpgroup

    def operand(descriptors: list[int], rows: int, transposed: bool) -> Array:
        """The matrices (warps, rows, 16) that the warps' descriptors name."""
        tiles = {
            each: load(c.shared.views[2][descriptor_offsets(each, rows, transposed) // 2])
            for each in set(descriptors)
        }
        return np.stack([tiles[each] for each in descriptors])

    def note(product: Product, units: Array, warp: int) -> None:
        """Check that a warp may read these units, from now until the wait."""
        c.shared.start_asynchronous_read(units, warp)
        product.units.append((units, warp))

    def run(_: Array | None) -> None:
        product = Product(target, np.empty(0), [], a_rows, None, i.text[:100])
        unit = c.shared.unit
        if a_rows is not None:
            product.a = file[a_rows]
            left = a_matrix(product.a, load)
        else:
            each = a_descriptor[::WARP].tolist()
            whole = operand(each, 64, transpose_a).reshape(-1, 4, 16, 16)
            left = whole[np.arange(len(place)), place]
            for w, warp in enumerate(c.warp[::WARP]):
                mine = range(16 * place[w], 16 * place[w] + 16)
                note(product, descriptor_units(each[w], 64, mine, transpose_a, unit), warp)
        each = b_descriptor[::WARP].tolist()
        right = operand(each, N, transpose_b)
        for distinct in set(each):
            readers = [warp for d, warp in zip(each, c.warp[::WARP], strict=True) if d == distinct]
            warp = readers[0] if len(readers) == 1 else np.uint8(SEVERAL)
            note(product, descriptor_units(distinct, N, range(N), transpose_b, unit), warp)
        total = np.matmul(left.astype(F8), right.astype(F8).swapaxes(1, 2))
        if accumulate[0]:
            total += accumulators(current(target).view(F4))
        product.result = to_registers(total.astype(F4)).view(U4)
        file[target] = IN_FLIGHT
        tensor.open.append(product)

    def current(target: Array) -> Array:
        """Values of accumulators, also while an earlier wgmma computes them."""
        for product in reversed(tensor.in_flight()):
            if np.array_equal(product.target, target):
                return product.result
            if np.isin(product.target, target).any():
                raise RaceError("wgmma accumulates into registers of another in flight")
        return file[target]

    return run


def commit_products(i: Instruction, c: Context, tensor: TensorCores) -> Run:
    def run(_: Array | None) -> None:
        tensor.groups.append(tensor.open)
        tensor.open = []

    return run


def wait_for_products(i: Instruction, c: Context, tensor: TensorCores) -> Run:
    """All but the latest N groups: their results appear in the registers."""
    pending = int(str(i.operands[0]))

    def run(_: Array | None) -> None:
        file = c.registers.files[32]
        while len(tensor.groups) > pending:
            done = tensor.groups.pop(0)
            for product in done:
                for units, warp in product.units:
                    c.shared.finish_asynchronous_read(units, warp)
                if product.rows is not None and not np.array_equal(file[product.rows], product.a):
                    raise RaceError(f"A's registers change under a wgmma in flight: {product.text}")
                if (file[product.target] != IN_FLIGHT).any():
                    raise RaceError(f"the accumulators of a wgmma in flight change: {product.text}")
            results = {tuple(product.target): product.result for product in done}
            still = {tuple(product.target) for product in tensor.in_flight()}
            for target, result in results.items():
                if target not in still:
                    file[list(target)] = result

    return run


def fence_registers(i: Instruction, c: Context, tensor: TensorCores) -> Run:
    """wgmma.fence orders register accesses, which the interpreter does one after the other.

    Not checked: LLVM moves conversions of A's registers behind it, which ptxas has to mend.
    """
    return lambda _: None


WGMMA = {
    "mma_async": mma_async,
    "commit_group": commit_products,
    "wait_group": wait_for_products,
    "fence": fence_registers,
}
BUILDERS: dict[str, Callable[[Instruction, Context], Run]] = {
    "mma": mma,
    "ldmatrix": ldmatrix,
    "stmatrix": stmatrix,
}
