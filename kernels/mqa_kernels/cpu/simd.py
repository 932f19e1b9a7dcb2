"""Vectors for numba: the instructions that a kernel is written in.

In a plain loop the compiler chooses how many partial sums it keeps, so the last bits of a sum would
depend on what else the loop does. Here a vector holds `LANES` float32 numbers, and a kernel says
itself what is added to which lane: a sum has the same bits wherever it is computed.

Pointers count elements and are not checked, as in Triton: the caller knows the bounds. A pointer
has the dtype of its memory. What is loaded becomes float32, what is stored is rounded to the
pointer's dtype. numba has no 16-bit floats: uint16 stands for bfloat16, int16 for float16.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_jitable,
    register_model,
)

# What numba compiles for: this processor, or what variables such as NUMBA_CPU_FEATURES say.
PROCESSOR = cpu_target.target_context.codegen().magic_tuple()
_triple, _, _features = PROCESSOR
_features = set(_features.split(","))
# Compiles a kernel, which Python calls. Without the lock of the interpreter, and without Python's
# check for a division by zero, which could raise.
kernel = njit(nogil=True, error_model="numpy")
# The same for a part of a kernel: not for calls from Python or C, which takes half as long again.
part = register_jitable(error_model="numpy", no_cfunc_wrapper=True)
# The same for a part that is copied into those that call it. A large one with one caller then
# compiles faster: a part by itself is compiled to machine code, and once more inside its caller.
inlined = njit(nogil=True, error_model="numpy", inline="always")

LANES = 16 if "+avx512f" in _features else 8  # float32 numbers of a vector
has_pause = "+sse2" in _features
# Whether there are instructions that convert float16. LLVM would call functions that are not there.
HAS_FLOAT16 = "+f16c" in _features or _triple.startswith(("aarch64", "arm64"))
# Whether there are products of 64 pairs of 8-bit integers in one instruction.
HAS_VNNI = "+avx512vnni" in _features and LANES == 16

if HAS_VNNI:
    llvm.initialize_native_asmparser()  # for `dot_tile`

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
SIZES = {types.float32: 4, types.int8: 1, types.uint16: 2, types.int16: 2}
_MEMORY = {
    types.float32: F32,
    types.int8: ir.IntType(8),
    types.uint16: ir.IntType(16),
    types.int16: ir.IntType(16),
}


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__("vector")


_vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VECTOR)


# ------------------------------------------------------------------------------------- memory


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """A pointer to an address (int64) of numbers of the dtype of an array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.inttoptr(arguments[0], kind)

    return types.CPointer(like.dtype)(types.int64, like), emit


@intrinsic
def cast(typing: Any, base: Any, like: Any) -> Any:
    """The same place as a pointer to numbers of the dtype of an array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(base, like), emit


@intrinsic
def at(typing: Any, base: Any, index: Any) -> Any:
    """The pointer `index` elements after another."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(*_split(arguments))

    return base(base, types.int64), emit


def _split(arguments: Any) -> Any:
    return arguments[0], [arguments[1]]


@intrinsic
def load(typing: Any, base: Any, index: Any, end: Any) -> Any:
    """`LANES` numbers from `index` on, as float32; 0 from `end` on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base_, index, end = arguments
        where = builder.gep(base_, [index])
        return emit_load_up_to(builder, base.dtype, where, builder.sub(end, index))

    return _vector(base, types.int64, types.int64), emit


@intrinsic
def store(typing: Any, base: Any, index: Any, value: Any, end: Any) -> Any:
    """Write a vector from `index` on, up to `end`; to int8 what lies between -127 and 127."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base_, index, x, end = arguments
        where, count = builder.gep(base_, [index]), builder.sub(end, index)
        if base.dtype == types.uint16:  # round to nearest, ties to even; NaN stays NaN
            bits = builder.bitcast(x, INTEGERS)
            odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, _all(0x7FFF))), _all(16))
            is_nan = builder.fcmp_unordered("uno", x, x)
            x = builder.select(is_nan, _all(0x7FC0), rounded)
            x = builder.trunc(x, ir.VectorType(ir.IntType(16), LANES))
        elif base.dtype == types.int16:
            half = builder.fptrunc(x, ir.VectorType(ir.HalfType(), LANES))
            x = builder.bitcast(half, ir.VectorType(ir.IntType(16), LANES))
        elif base.dtype == types.int8:
            integers = builder.fptosi(emit_call(builder, "rint", x), INTEGERS)
            x = builder.trunc(integers, ir.VectorType(ir.IntType(8), LANES))
        with builder.if_else(builder.icmp_signed(">=", count, I64(LANES))) as (whole, part):
            with whole:
                builder.store(x, builder.bitcast(where, x.type.as_pointer()), align=1)
            with part:
                memory = cgutils.alloca_once_value(builder, x)
                _copy(builder, builder.bitcast(memory, where.type), where, count)
        return context.get_dummy_value()

    return types.void(base, types.int64, _vector, types.int64), emit


def emit_load(builder: Any, dtype: Any, where: Any, count: Any = None) -> Any:
    """`LANES` numbers as float32, or fewer and zeros."""
    kind = ir.VectorType(_MEMORY[dtype], LANES)
    if count is not None:
        memory = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, None), memory)
        _copy(builder, where, builder.bitcast(memory, where.type), count)
        where = memory
    x = builder.load(builder.bitcast(where, kind.as_pointer()), align=1)
    if dtype == types.int8:
        return builder.sitofp(builder.sext(x, INTEGERS), VECTOR)
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(x, INTEGERS), _all(16)), VECTOR)
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(x, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    return x


def emit_load_up_to(builder: Any, dtype: Any, where: Any, count: Any) -> Any:
    """`emit_load`, of `LANES` numbers if there are as many, else of `count`."""
    with builder.if_else(builder.icmp_signed(">=", count, I64(LANES))) as (whole, part):
        with whole:
            a, a_block = emit_load(builder, dtype, where), builder.basic_block
        with part:
            b, b_block = emit_load(builder, dtype, where, count), builder.basic_block
    x = builder.phi(VECTOR)
    x.add_incoming(a, a_block)
    x.add_incoming(b, b_block)
    return x


def _copy(builder: Any, source: Any, target: Any, count: Any) -> None:
    with cgutils.for_range(builder, count) as loop:
        number = builder.load(builder.gep(source, [loop.index]))
        builder.store(number, builder.gep(target, [loop.index]))


def _all(value: int) -> Any:
    return ir.Constant(INTEGERS, [value] * LANES)


# --------------------------------------------------------------------------------- arithmetic


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """A vector whose lanes all hold one number."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit_splat(builder, arguments[0])

    return _vector(types.float32), emit


def emit_splat(builder: Any, number: Any) -> Any:
    """A vector whose lanes all hold one number."""
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, I32(0))
    lanes = ir.Constant(INTEGERS, [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), lanes)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    # Not by `overload`, which would compile a function for each.
    @infer_global(_function)
    class _Typing(ConcreteTemplate):
        cases: ClassVar[list[Any]] = [_vector(_vector, _vector)]

    @lower_builtin(_function, _vector, _vector)
    def _emit(
        context: Any, builder: Any, signature: Any, arguments: Any, instruction: str = _instruction
    ) -> Any:
        return getattr(builder, instruction)(*arguments)


def emit_call(builder: Any, name: str, *arguments: Any) -> Any:
    """A call of an intrinsic function of LLVM whose result is of its arguments' type."""
    kind = arguments[0].type
    suffix = "f32" if kind == F32 else f"v{LANES}f32"
    function_type = ir.FunctionType(kind, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(
        builder.module, function_type, f"llvm.{name}.{suffix}"
    )
    return builder.call(function, arguments)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit_call(builder, "fma", *arguments)

    return _vector(_vector, _vector, _vector), emit


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum of a vector's lanes, halves first."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit_reduction(builder, arguments[0], builder.fadd)

    return types.float32(_vector), emit


@intrinsic
def largest(typing: Any, x: Any) -> Any:
    """The largest of a vector's lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit_reduction(
            builder, arguments[0], lambda a, b: emit_call(builder, "maxnum", a, b)
        )

    return types.float32(_vector), emit


def emit_reduction(builder: Any, x: Any, combine: Any) -> Any:
    """The lanes combined into one number: the two halves, then their halves, ..."""
    width = LANES
    while width > 1:
        width //= 2
        x = combine(x, emit_shuffle(builder, x, x, [(i + width) % LANES for i in range(LANES)]))
    return builder.extract_element(x, I32(0))


def emit_shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """The lanes of a and, counted on from `LANES`, of b, in this order."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@intrinsic
def clamp(typing: Any, x: Any, low: Any, high: Any) -> Any:
    """x between two vectors; NaN stays NaN."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, low, high = arguments
        x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
        return builder.select(builder.fcmp_ordered(">", x, high), high, x)

    return _vector(_vector, _vector, _vector), emit


@intrinsic
def keep(typing: Any, x: Any, count: Any) -> Any:
    """The first lanes of a vector, 0 in the others."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, count = arguments
        lanes = ir.Constant(INTEGERS, list(range(LANES)))
        one = builder.insert_element(lanes, builder.trunc(count, I32), I32(0))
        counts = builder.shuffle_vector(one, one, ir.Constant(INTEGERS, [0] * LANES))
        is_kept = builder.icmp_signed("<", lanes, counts)
        return builder.select(is_kept, x, ir.Constant(VECTOR, [0.0] * LANES))

    return _vector(_vector, types.int64), emit


@intrinsic
def nearest(typing: Any, x: Any) -> Any:
    """x rounded to whole numbers."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit_call(builder, "rint", arguments[0])

    return _vector(_vector), emit


@intrinsic
def power_of_two(typing: Any, n: Any) -> Any:
    """2^n for whole n from -126 to 127: n becomes the exponent of a float."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integers = builder.fptosi(arguments[0], INTEGERS)
        return builder.bitcast(builder.shl(builder.add(integers, _all(127)), _all(23)), VECTOR)

    return _vector(_vector), emit
