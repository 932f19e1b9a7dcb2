"""Integer, logic, floating-point and conversion instructions, bound to the registers of a group.

Source: PTX ISA 8.7, sections 9.7.1 (integer), 9.7.3 to 9.7.5 (floating point), 9.7.6 (comparison),
9.7.8 (logic and shift), 9.7.9 (data movement and conversion). Approximate instructions (ex2, lg2,
rcp, rsqrt, div.full) are computed exactly and rounded once; hardware may err by an ulp or two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.parse import Instruction, Operand, UnknownPTXError
from tests.ptx.registers import WARP, Array, Registers, Run, apply, assign, dtype_of

F4, F8, U2, U4, U8 = (np.dtype(x) for x in ("f4", "f8", "u2", "u4", "u8"))
SMALLEST_NORMAL = np.finfo(F4).tiny


def from_bfloat16(bits: Array) -> Array:
    """float32 values of bfloat16 bits."""
    return (bits.astype(U4) << np.uint32(16)).view(F4)


def to_bfloat16(x: Array) -> Array:
    """bfloat16 bits of float32 values, rounded to nearest even; any NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(x, F4).view(U4)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(U2)


def from_float16(bits: Array) -> Array:
    return bits.view("f2").astype(F4)


def to_float16(x: Array) -> Array:
    return np.where(np.isnan(x), U2.type(0x7FFF), x.astype("f2").view(U2))


SHORT_FLOATS = {"bf16": (from_bfloat16, to_bfloat16), "f16": (from_float16, to_float16)}


def flushed(x: Array) -> Array:
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F4.type(0), x), x)


def translate(instruction: Instruction, registers: Registers) -> Run | None:
    """The instruction as a function of the threads' mask; None if it is of another module."""
    build = BUILDERS.get(instruction.name)
    return None if build is None else build(instruction, registers)


# --- integers, logic and simple floating point -------------------------------------------------


def two_operands(function: np.ufunc) -> Callable[[Instruction, Registers], Run]:
    """add, sub, and, or, xor, min, max: one NumPy function of two operands."""

    def build(i: Instruction, r: Registers) -> Run:
        if i.type in ("bf16x2", "f16x2"):
            return packed(function, i, r)
        check_modifiers(i, "s32", "u32", "s64", "u64", "s16", "u16", "b16", "b32", "b64", "f32",
                        "pred", "rn", "ftz")  # fmt: skip
        dtype = dtype_of(i.type)
        target, (a, b) = r.target(i.operands[0], dtype), sources(i, r, dtype)
        if "ftz" in i.modifiers:
            return assign(target, lambda: flushed(function(flushed(a), flushed(b))))
        return apply(function, target, a, b)

    return build


def packed(function: np.ufunc, i: Instruction, r: Registers) -> Run:
    """Two 16-bit floats per register."""
    load, store = SHORT_FLOATS[i.type.removesuffix("x2")]
    target, (a, b) = r.target(i.operands[0], U4), sources(i, r, U4)
    return assign(target, lambda: store(function(load(a.view(U2)), load(b.view(U2)))).view(U4))


def minimum_or_maximum(integer: np.ufunc, floating: np.ufunc) -> Callable:
    """min and max: of floats, the number if the other operand is NaN; .relu: not below 0."""

    def build(i: Instruction, r: Registers) -> Run:
        if i.type != "f32" and "relu" not in i.modifiers:
            return two_operands(integer)(i, r)
        check_modifiers(i, "s32", "relu", "f32")
        dtype = dtype_of(i.type)
        target, (a, b) = r.target(i.operands[0], dtype), sources(i, r, dtype)
        if "relu" in i.modifiers:
            return assign(target, lambda: np.maximum(integer(a, b), 0))
        return apply(floating, target, a, b)

    return build


def one_operand(function: np.ufunc) -> Callable[[Instruction, Registers], Run]:
    """neg, not, abs."""

    def build(i: Instruction, r: Registers) -> Run:
        check_modifiers(i, "f32", "s32", "s64", "b16", "b32", "b64", "pred", "ftz")
        dtype = dtype_of(i.type)
        target, (a,) = r.target(i.operands[0], dtype), sources(i, r, dtype)
        if "ftz" in i.modifiers:
            return assign(target, lambda: flushed(function(a)))
        return apply(function, target, a)

    return build


def multiply(i: Instruction, r: Registers) -> Run:
    """mul and mad: .lo, .hi or .wide for integers."""
    dtype = dtype_of(i.type)
    if dtype.kind == "f":
        return two_operands(np.multiply)(i, r)
    check_modifiers(i, "lo", "hi", "wide", "s16", "u16", "s32", "u32", "s64", "u64")
    adds = i.name == "mad"
    part = i.modifiers[0]
    a, b = sources(i, r, dtype, 2)
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if dtype.itemsize < 8 else None
    if part == "lo":
        target = r.target(i.operands[0], dtype)
        if not adds:
            return apply(np.multiply, target, a, b)
        c = r.source(i.operands[3], dtype)
        return assign(target, lambda: a * b + c)
    if wide is None or (part == "hi" and adds):
        raise UnknownPTXError(i.text)
    if part == "wide":
        target = r.target(i.operands[0], wide)
        if not adds:
            return assign(target, lambda: a.astype(wide) * b.astype(wide))
        c = r.source(i.operands[3], wide)
        return assign(target, lambda: a.astype(wide) * b.astype(wide) + c)
    shift = wide.type(8 * dtype.itemsize)
    target = r.target(i.operands[0], dtype)
    return assign(target, lambda: ((a.astype(wide) * b.astype(wide)) >> shift).astype(dtype))


def divide(i: Instruction, r: Registers) -> Run:
    """div and rem: integers truncate towards zero; div.full.f32 is a quotient within 2 ulp."""
    if i.type == "f32":
        check_modifiers(i, "full", "rn", "f32")
        a, b = sources(i, r, F4)
        return apply(np.divide, r.target(i.operands[0], F4), a, b)
    check_modifiers(i, "s32", "u32", "s64", "u64")
    dtype = dtype_of(i.type)
    target, (a, b) = r.target(i.operands[0], dtype), sources(i, r, dtype)

    def compute() -> Array:
        # A thread whose result is not used may divide by zero.
        divisor = np.where(b == 0, dtype.type(1), b)
        remainder = np.fmod(a, divisor)  # has a's sign
        return remainder if i.name == "rem" else (a - remainder) // divisor

    return assign(target, compute)


def shift(i: Instruction, r: Registers) -> Run:
    """shl and shr: amounts from the width on shift everything out."""
    dtype = dtype_of(i.type)
    bits = 8 * dtype.itemsize
    a, amount = r.source(i.operands[1], dtype), r.source(i.operands[2], U4)
    target = r.target(i.operands[0], dtype)
    function = np.left_shift if i.name == "shl" else np.right_shift
    signed = dtype.kind == "i"

    def compute() -> Array:
        inside = function(a, np.minimum(amount, bits - 1).astype(dtype))
        return inside if signed else np.where(amount < bits, inside, dtype.type(0))

    if not str(i.operands[2]).startswith("%") and int(amount[0]) < bits:
        return apply(function, target, a, r.constant(int(amount[0]), dtype))
    if signed and i.name == "shl":
        raise UnknownPTXError(i.text)
    return assign(target, compute)


def funnel_shift(i: Instruction, r: Registers) -> Run:
    """shf.{l,r}.wrap: 32 bits of the 64-bit value b:a, shifted by the amount modulo 32."""
    check_modifiers(i, "l", "r", "wrap", "b32")
    a, b, amount = sources(i, r, U4)
    left = i.modifiers[0] == "l"

    def compute() -> Array:
        pair = (b.astype(U8) << U8.type(32)) | a
        by = (amount & U4.type(31)).astype(U8)
        return ((pair << by) >> U8.type(32) if left else pair >> by).astype(U4)

    return assign(r.target(i.operands[0], U4), compute)


def bit_field(i: Instruction, r: Registers) -> Run:
    """bfe: `length` bits of a from `position` on; signed ones extend their highest bit."""
    check_modifiers(i, "u32", "s32", "u64", "s64")
    dtype = dtype_of(i.type)
    bits, unsigned = (64, U8) if dtype.itemsize == 8 else (32, U4)
    a, target = r.source(i.operands[1], unsigned), r.target(i.operands[0], dtype)
    if any(str(x).startswith("%") for x in i.operands[2:]):
        raise UnknownPTXError(i.text)
    position, length = (int(str(x), 0) & 255 for x in i.operands[2:])
    if position + length > bits:
        raise UnknownPTXError(i.text)
    top, down = unsigned.type(bits - length - position), unsigned.type(bits - length)
    if length == 0:
        return assign(target, lambda: np.zeros_like(a).view(dtype))
    return assign(target, lambda: (a << top).view(dtype) >> dtype.type(down))


def look_up_logic(i: Instruction, r: Registers) -> Run:
    """lop3: any function of three bits; bit k of the table is its value for a, b, c = k's bits."""
    check_modifiers(i, "b32")
    a, b, c = sources(i, r, U4, 3)
    table = int(str(i.operands[4]), 0)

    def compute() -> Array:
        result = np.zeros_like(a)
        for k in range(8):
            if table >> k & 1:
                result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return result

    return assign(r.target(i.operands[0], U4), compute)


def permute(i: Instruction, r: Registers) -> Run:
    """prmt: each byte is one of the eight of b:a, or its sign repeated eight times."""
    check_modifiers(i, "b32")
    a, b, selector = sources(i, r, U4)

    def compute() -> Array:
        pool = np.stack([a, b], 1).view("u1")  # (threads, 8)
        choice = (selector[:, None] >> np.arange(0, 16, 4, dtype=U4)) & U4.type(15)  # (threads, 4)
        chosen = np.take_along_axis(pool, (choice & U4.type(7)).astype(int), 1)
        signs = np.where(chosen & 0x80, 0xFF, 0).astype("u1")
        return np.where(choice & U4.type(8), signs, chosen).view(U4)[:, 0]

    return assign(r.target(i.operands[0], U4), compute)


# --- floating point ----------------------------------------------------------------------------


def fused_multiply_add(i: Instruction, r: Registers) -> Run:
    """fma: a * b + c, rounded once.

    In float64 the product is exact and the sum is rounded a first time, to 53 bits. That makes a
    difference only if the sum then lies exactly between two float32 numbers.
    """
    check_modifiers(i, "rn", "ftz", "f32")
    target, (a, b, c) = r.target(i.operands[0], F4), sources(i, r, F4)
    wide = np.empty(r.threads, F8)

    def compute() -> Array:
        np.multiply(a, b, out=wide, dtype=F8)
        np.add(wide, c, out=wide)
        return wide.astype(F4)

    def compute_flushed() -> Array:
        x, y, z = (flushed(operand).astype(F8) for operand in (a, b, c))
        return flushed((x * y + z).astype(F4))

    return assign(target, compute_flushed if "ftz" in i.modifiers else compute)


def approximate(function: Callable[[Array], Array]) -> Callable[[Instruction, Registers], Run]:
    """ex2, lg2, rcp, rsqrt, sqrt, tanh of float32: computed in float64, rounded once."""

    def build(i: Instruction, r: Registers) -> Run:
        check_modifiers(i, "approx", "rn", "ftz", "f32")
        target, (a,) = r.target(i.operands[0], F4), sources(i, r, F4)
        if "ftz" in i.modifiers:
            return assign(target, lambda: flushed(function(flushed(a).astype(F8)).astype(F4)))
        return assign(target, lambda: function(a.astype(F8)).astype(F4))

    return build


COMPARISONS = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}


OPPOSITES = {"neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def compare(i: Instruction, r: Registers) -> Run:
    """setp: a predicate. Of floats, comparisons with NaN are false, with suffix u true."""
    comparison, kind = i.modifiers[0], i.type
    if len(i.modifiers) != 2 or "|" in str(i.operands[0]):
        raise UnknownPTXError(i.text)
    target = r.target(i.operands[0], np.dtype(bool))
    load = SHORT_FLOATS[kind][0] if kind in SHORT_FLOATS else np.asarray
    a, b = sources(i, r, U2 if kind in SHORT_FLOATS else dtype_of(kind))
    if a.dtype.kind != "f" and kind not in SHORT_FLOATS:
        return apply(COMPARISONS[comparison], target, a, b)
    if comparison in ("nan", "num"):
        return assign(
            target, lambda: (np.isnan(load(a)) | np.isnan(load(b))) == (comparison == "nan")
        )
    if comparison in COMPARISONS and comparison != "ne":
        function = COMPARISONS[comparison]
        return assign(target, lambda: function(load(a), load(b)))
    if comparison not in OPPOSITES:
        raise UnknownPTXError(i.text)
    opposite = COMPARISONS[OPPOSITES[comparison]]
    return assign(target, lambda: ~opposite(load(a), load(b)))


def select(i: Instruction, r: Registers) -> Run:
    """selp: a where the predicate holds, else b."""
    dtype = dtype_of(i.type)
    a, b = sources(i, r, dtype, 2)
    choice = r.source(i.operands[3], np.dtype(bool))
    return assign(r.target(i.operands[0], dtype), lambda: np.where(choice, a, b))


# --- moves and conversions ---------------------------------------------------------------------


def move(i: Instruction, r: Registers) -> Run:
    """mov, also between a register and a vector of its parts, lowest first."""
    dtype = dtype_of(i.type)
    first, second = i.operands
    if isinstance(first, tuple):
        part = np.dtype(f"u{dtype.itemsize // len(first)}")
        whole = np.ascontiguousarray(r.source(second, dtype))
        # A view of the source, so that it is read when the instruction runs.
        source = r.source(second, dtype).view(part).reshape(-1, len(first))
        assert np.shares_memory(whole, source) or not str(second).startswith("%")
        runs = [apply(np.positive, r.target(x, part), source[:, k]) for k, x in enumerate(first)]

        def run(mask: Array | None) -> None:
            for each in runs:
                each(mask)

        return run
    if isinstance(second, tuple):
        part = np.dtype(f"u{dtype.itemsize // len(second)}")
        parts = [r.source(x, part) for x in second]
        return assign(r.target(first, dtype), lambda: np.stack(parts, 1).view(dtype)[:, 0])
    if dtype.kind == "b":
        return apply(np.logical_or, r.target(first, dtype), *[r.source(second, dtype)] * 2)
    return apply(np.positive, r.target(first, dtype), r.source(second, dtype))


def convert(i: Instruction, r: Registers) -> Run:
    """cvt: between integers by truncation or extension; to shorter floats by rounding (.rn)."""
    to, of = i.modifiers[-2:]
    check_modifiers(i, "rn", to, of)
    if to in ("bf16x2", "f16x2"):  # the first source is the upper half
        store = SHORT_FLOATS[to.removesuffix("x2")][1]
        high, low = sources(i, r, F4)
        return assign(
            r.target(i.operands[0], U4), lambda: store(np.stack([low, high], 1)).view(U4)[:, 0]
        )
    if to in SHORT_FLOATS and of in ("f32", "s16", "u16", "s8", "u8"):  # float32 holds the integers
        store, (a,) = SHORT_FLOATS[to][1], sources(i, r, dtype_of(of))
        return assign(r.target(i.operands[0], U2), lambda: store(a.astype(F4)))
    if of in SHORT_FLOATS and to == "f32":
        load, (a,) = SHORT_FLOATS[of][0], sources(i, r, U2)
        return assign(r.target(i.operands[0], F4), lambda: load(a))
    source, result = dtype_of(of), dtype_of(to)
    if source.kind == "f" or (result.kind == "f" and to != "f32") or to in SHORT_FLOATS:
        raise UnknownPTXError(i.text)
    (a,) = sources(i, r, source)
    return assign(r.target(i.operands[0], result), lambda: a.astype(result))


def shuffle(i: Instruction, r: Registers) -> Run:
    """shfl.sync: each lane takes the value of another lane of its warp."""
    mode = i.modifiers[1]
    if mode not in ("bfly", "idx") or i.operands[3:] != ("31", "-1"):
        raise UnknownPTXError(i.text)
    value, lane = r.source(i.operands[1], U4), r.source(i.operands[2], U4)
    target = r.target(i.operands[0], U4)
    mine = np.arange(r.threads) % WARP
    warp = np.arange(r.threads) - mine

    def run(mask: Array | None) -> None:
        assert (
            mask is None or (mask.reshape(-1, WARP).all(1) == mask.reshape(-1, WARP).any(1)).all()
        )
        other = mine ^ lane if mode == "bfly" else lane & U4.type(31)
        result = value[warp + other.astype(int)]
        np.copyto(target, result, where=True if mask is None else mask)

    return run


def sources(i: Instruction, r: Registers, dtype: np.dtype, count: int | None = None) -> list[Array]:
    """The operands after the first."""
    operands: tuple[Operand, ...] = i.operands[1:] if count is None else i.operands[1 : count + 1]
    return [r.source(x, dtype) for x in operands]


def check_modifiers(i: Instruction, *known: str) -> None:
    unknown = set(i.modifiers) - set(known)
    if unknown:
        raise UnknownPTXError(f".{', .'.join(sorted(unknown))} in {i.text}")


BUILDERS: dict[str, Callable[[Instruction, Registers], Run]] = {
    "add": two_operands(np.add),
    "sub": two_operands(np.subtract),
    "and": two_operands(np.bitwise_and),
    "or": two_operands(np.bitwise_or),
    "xor": two_operands(np.bitwise_xor),
    "min": minimum_or_maximum(np.minimum, np.fmin),
    "max": minimum_or_maximum(np.maximum, np.fmax),
    "neg": one_operand(np.negative),
    "not": one_operand(np.invert),
    "abs": one_operand(np.abs),
    "mul": multiply,
    "mad": multiply,
    "div": divide,
    "rem": divide,
    "shl": shift,
    "shr": shift,
    "shf": funnel_shift,
    "bfe": bit_field,
    "lop3": look_up_logic,
    "prmt": permute,
    "fma": fused_multiply_add,
    "ex2": approximate(np.exp2),
    "lg2": approximate(np.log2),
    "rcp": approximate(np.reciprocal),
    "sqrt": approximate(np.sqrt),
    "rsqrt": approximate(lambda x: 1 / np.sqrt(x)),
    "tanh": approximate(np.tanh),
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvt": convert,
    "shfl": shuffle,
}
