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
from numba.extending import intrinsic, lower_builtin, models, register_model

# What numba compiles for: this processor, or what variables such as NUMBA_CPU_FEATURES say.
_triple, _, _features = cpu_target.target_context.codegen().magic_tuple()
_features = set(_features.split(","))
# Compiles a kernel. Without the lock of the interpreter, and without Python's check for a division
# by zero, which could raise.
kernel = njit(nogil=True, error_model="numpy")
# The same for a part that is copied into the kernels that call it.
inlined = njit(nogil=True, error_model="numpy", inline="always")

LANES = 16 if "+avx512f" in _features else 8  # float32 numbers of a vector
has_pause = "+sse2" in _features
# Whether there are instructions that convert float16. LLVM would call functions that are not there.
HAS_FLOAT16 = "+f16c" in _features or _triple.startswith(("aarch64", "arm64"))
# Whether there are products of 64 pairs of 8-bit integers in one instruction.
HAS_VNNI = "+avx512vnni" in _features and LANES == 16

if HAS_VNNI:
    llvm.initialize_native_asmparser()  # for `dot_tile`

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_SIZES = {types.float32: 4, types.int8: 1, types.uint16: 2, types.int16: 2}
_MEMORY = {
    types.float32: _F32,
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
        super().__init__(dmm, fe_type, _VECTOR)


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
        return _load_up_to(builder, base.dtype, where, builder.sub(end, index))

    return _vector(base, types.int64, types.int64), emit


@intrinsic
def store(typing: Any, base: Any, index: Any, value: Any, end: Any) -> Any:
    """Write a vector from `index` on, up to `end`; to int8 what lies between -127 and 127."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base_, index, x, end = arguments
        where, count = builder.gep(base_, [index]), builder.sub(end, index)
        if base.dtype == types.uint16:  # round to nearest, ties to even; NaN stays NaN
            bits = builder.bitcast(x, _INTEGERS)
            odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, _all(0x7FFF))), _all(16))
            is_nan = builder.fcmp_unordered("uno", x, x)
            x = builder.select(is_nan, _all(0x7FC0), rounded)
            x = builder.trunc(x, ir.VectorType(ir.IntType(16), LANES))
        elif base.dtype == types.int16:
            half = builder.fptrunc(x, ir.VectorType(ir.HalfType(), LANES))
            x = builder.bitcast(half, ir.VectorType(ir.IntType(16), LANES))
        elif base.dtype == types.int8:
            integers = builder.fptosi(_call(builder, "rint", x), _INTEGERS)
            x = builder.trunc(integers, ir.VectorType(ir.IntType(8), LANES))
        with builder.if_else(builder.icmp_signed(">=", count, _I64(LANES))) as (whole, part):
            with whole:
                builder.store(x, builder.bitcast(where, x.type.as_pointer()), align=1)
            with part:
                memory = cgutils.alloca_once_value(builder, x)
                _copy(builder, builder.bitcast(memory, where.type), where, count)
        return context.get_dummy_value()

    return types.void(base, types.int64, _vector, types.int64), emit


def _load(builder: Any, dtype: Any, where: Any, count: Any = None) -> Any:
    """`LANES` numbers as float32, or fewer and zeros."""
    kind = ir.VectorType(_MEMORY[dtype], LANES)
    if count is not None:
        memory = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, None), memory)
        _copy(builder, where, builder.bitcast(memory, where.type), count)
        where = memory
    x = builder.load(builder.bitcast(where, kind.as_pointer()), align=1)
    if dtype == types.int8:
        return builder.sitofp(builder.sext(x, _INTEGERS), _VECTOR)
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(x, _INTEGERS), _all(16)), _VECTOR)
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(x, ir.VectorType(ir.HalfType(), LANES)), _VECTOR)
    return x


def _load_up_to(builder: Any, dtype: Any, where: Any, count: Any) -> Any:
    """`_load`, of all numbers where there are so many."""
    with builder.if_else(builder.icmp_signed(">=", count, _I64(LANES))) as (whole, part):
        with whole:
            a, a_block = _load(builder, dtype, where), builder.basic_block
        with part:
            b, b_block = _load(builder, dtype, where, count), builder.basic_block
    x = builder.phi(_VECTOR)
    x.add_incoming(a, a_block)
    x.add_incoming(b, b_block)
    return x


def _copy(builder: Any, source: Any, target: Any, count: Any) -> None:
    with cgutils.for_range(builder, count) as loop:
        number = builder.load(builder.gep(source, [loop.index]))
        builder.store(number, builder.gep(target, [loop.index]))


def _all(value: int) -> Any:
    return ir.Constant(_INTEGERS, [value] * LANES)


# --------------------------------------------------------------------------------- arithmetic


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """A vector whose lanes all hold one number."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0])

    return _vector(types.float32), emit


def _splat(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _I32(0))
    lanes = ir.Constant(_INTEGERS, [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), lanes)


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


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    """A call of an intrinsic function of LLVM whose result is of its arguments' type."""
    kind = arguments[0].type
    suffix = "f32" if kind == _F32 else f"v{LANES}f32"
    function_type = ir.FunctionType(kind, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(
        builder.module, function_type, f"llvm.{name}.{suffix}"
    )
    return builder.call(function, arguments)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "fma", *arguments)

    return _vector(_vector, _vector, _vector), emit


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum of a vector's lanes, halves first."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _reduce(builder, arguments[0], builder.fadd)

    return types.float32(_vector), emit


@intrinsic
def largest(typing: Any, x: Any) -> Any:
    """The largest of a vector's lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _reduce(builder, arguments[0], lambda a, b: _call(builder, "maxnum", a, b))

    return types.float32(_vector), emit


def _reduce(builder: Any, x: Any, combine: Any) -> Any:
    """The lanes combined into one number: the two halves, then their halves, ..."""
    width = LANES
    while width > 1:
        width //= 2
        x = combine(x, _shuffle(builder, x, x, [(i + width) % LANES for i in range(LANES)]))
    return builder.extract_element(x, _I32(0))


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """The lanes of a and, counted on from `LANES`, of b, in this order."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


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
        lanes = ir.Constant(_INTEGERS, list(range(LANES)))
        one = builder.insert_element(lanes, builder.trunc(count, _I32), _I32(0))
        counts = builder.shuffle_vector(one, one, ir.Constant(_INTEGERS, [0] * LANES))
        is_kept = builder.icmp_signed("<", lanes, counts)
        return builder.select(is_kept, x, ir.Constant(_VECTOR, [0.0] * LANES))

    return _vector(_vector, types.int64), emit


@intrinsic
def nearest(typing: Any, x: Any) -> Any:
    """x rounded to whole numbers."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "rint", arguments[0])

    return _vector(_vector), emit


@intrinsic
def power_of_two(typing: Any, n: Any) -> Any:
    """2^n for whole n from -126 to 127: n becomes the exponent of a float."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integers = builder.fptosi(arguments[0], _INTEGERS)
        return builder.bitcast(builder.shl(builder.add(integers, _all(127)), _all(23)), _VECTOR)

    return _vector(_vector), emit


# ------------------------------------------------------------------------------------ matrices


@intrinsic(prefer_literal=True)
def dot_tile(
    typing: Any,
    x: Any,
    ldx: Any,
    w: Any,
    ldw: Any,
    K: Any,
    following: Any,
    end: Any,
    out: Any,
    ldo: Any,
    adds: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """out[r, n] = sum of x[r, k] w[n, k] over k: a few rows and columns, known at compile time.

    The sums stay in registers, and each number that is loaded serves a whole row or column of
    them. A sum has `LANES` parts, of every `LANES`-th k in rising order, which are added last:
    it has the same bits in tiles of all sizes.

    If x is int8, as `linear.round_rows` makes it, and `HAS_VNNI`, the sums are of integers.

    Args:
        following: the next tile's w, which is asked for from memory meanwhile.
        end: from a row's first integer to the int32 that its sum begins with.
        adds: whether to add the sums to what `out` holds.
    """
    R, N = rows.literal_value, columns.literal_value
    in_integers = HAS_VNNI and x.dtype == w.dtype == types.int8

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_base, x_step, w_base, w_step, length, next_base, end, out_base, out_step, adds = (
            arguments[:10]
        )
        x_rows = _rows(builder, x_base, x_step, R)
        w_rows = _rows(builder, w_base, w_step, N)
        next_rows = _rows(builder, next_base, w_step, N)

        def products(k: Any, sums: list[Any], count: Any = None) -> list[Any]:
            if count is None and N > 1:
                _prefetch(builder, next_rows, k, LANES, 64 // _SIZES[w.dtype])
            columns = [_load(builder, w.dtype, builder.gep(row, [k]), count) for row in w_rows]
            values = [_load(builder, x.dtype, builder.gep(row, [k]), count) for row in x_rows]
            return [
                _call(builder, "fma", values[i // N], columns[i % N], sums[i]) for i in range(R * N)
            ]

        def last_products(k: Any, sums: list[Any]) -> list[Any]:
            return products(k, sums, builder.sub(length, k))

        def integer_products(k: Any, sums: list[Any]) -> list[Any]:
            if N > 1:
                _prefetch(builder, next_rows, k, 4 * LANES, 64)
            # The instruction multiplies unsigned by signed numbers: w + 128 by x.
            columns = [_integers(builder, builder.gep(row, [k])) for row in w_rows]
            columns = [
                builder.xor(c, ir.Constant(_INTEGERS, [-0x7F7F7F80] * LANES)) for c in columns
            ]
            values = [_integers(builder, builder.gep(row, [k])) for row in x_rows]
            return [
                builder.asm(
                    ir.FunctionType(_INTEGERS, [_INTEGERS] * 3), "vpdpbusd $3, $2, $0",
                    "=v,0,v,v", [sums[i], columns[i % N], values[i // N]], False,
                )
                for i in range(R * N)
            ]  # fmt: skip

        if in_integers:
            # The first lane begins with what the 128 are too much.
            begin = []
            for row in x_rows:
                where = builder.bitcast(builder.gep(row, [end]), _I32.as_pointer())
                none = ir.Constant(_INTEGERS, [0] * LANES)
                begin += [builder.insert_element(none, builder.load(where), _I32(0))] * N
            sums = _loop(builder, _I64(0), length, 4 * LANES, begin, integer_products)
            sums = [builder.sitofp(x, _VECTOR) for x in sums]
        else:
            whole = builder.and_(length, _I64(-LANES))
            sums = _loop(builder, _I64(0), whole, LANES, _zeros(R * N), products)
            sums = _loop(builder, whole, length, LANES, sums, last_products)
        for r, row in enumerate(_rows(builder, out_base, out_step, R)):
            _store_sums(builder, row, sums[r * N : (r + 1) * N], adds)
        return context.get_dummy_value()

    n = types.int64
    return types.void(x, n, w, n, n, w, n, out, n, types.boolean, rows, columns), emit


def _prefetch(builder: Any, rows: list[Any], k: Any, step: int, line: int) -> None:
    """Ask for the rows' numbers from k on: each cache line, of `line` numbers, once while k goes
    in steps through a row."""
    share = max(1, line // step)  # steps in a line: each asks for a share of the rows
    turn = builder.urem(builder.udiv(k, _I64(step)), _I64(share))
    here = builder.and_(k, _I64(-line))
    for i in range(0, len(rows), share):
        row = rows[i]
        for j in range(1, min(share, len(rows) - i)):
            is_turn = builder.icmp_signed("==", turn, _I64(j))
            row = builder.select(is_turn, rows[i + j], row)
        place = builder.bitcast(builder.gep(row, [here]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [place, _I32(0), _I32(2), _I32(1)])  # read, second-level cache, data


@intrinsic(prefer_literal=True)
def weighted_tile(
    typing: Any,
    p: Any,
    ldp: Any,
    v: Any,
    ldv: Any,
    S: Any,
    D: Any,
    out: Any,
    ldo: Any,
    rows: Any,
    vectors: Any,
) -> Any:
    """out[r, d] = sum of p[r, s] v[s, d] over s in rising order: a few rows and vectors of d.

    What a last single vector reads ends at D; it is written as a whole.
    """
    R, N = rows.literal_value, vectors.literal_value

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        p_base, p_step, v_base, v_step, length, end, out_base, out_step = arguments[:8]
        p_rows = _rows(builder, p_base, p_step, R)

        def products(s: Any, sums: list[Any]) -> list[Any]:
            row = builder.gep(v_base, [builder.mul(s, v_step)])
            places = [builder.gep(row, [_I64(n * LANES)]) for n in range(N)]
            if N == 1:
                values = [_load_up_to(builder, v.dtype, places[0], end)]
            else:
                values = [_load(builder, v.dtype, place) for place in places]
            weights = [_splat(builder, builder.load(builder.gep(base, [s]))) for base in p_rows]
            return [
                _call(builder, "fma", weights[i // N], values[i % N], sums[i]) for i in range(R * N)
            ]

        sums = _loop(builder, _I64(0), length, 1, _zeros(R * N), products)
        for r, row in enumerate(_rows(builder, out_base, out_step, R)):
            for n in range(N):
                where = builder.gep(row, [_I64(n * LANES)])
                where = builder.bitcast(where, _VECTOR.as_pointer())
                builder.store(sums[r * N + n], where, align=4)
        return context.get_dummy_value()

    n = types.int64
    return types.void(p, n, v, n, n, n, out, n, rows, vectors), emit


def _rows(builder: Any, base: Any, step: Any, count: int) -> list[Any]:
    """Pointers to the first rows of a matrix."""
    return [builder.gep(base, [builder.mul(step, _I64(i))]) for i in range(count)]


def _zeros(count: int) -> list[Any]:
    return [ir.Constant(_VECTOR, [0.0] * LANES)] * count


def _integers(builder: Any, where: Any) -> Any:
    """The bytes of a vector, four to a lane."""
    return builder.load(builder.bitcast(where, _INTEGERS.as_pointer()), align=1)


def _loop(builder: Any, first: Any, end: Any, step: int, begin: list[Any], body: Any) -> list[Any]:
    """The vectors after `sums = body(k, sums)` for k in range(first, end, step)."""
    start = builder.basic_block
    head, loop, done = (builder.append_basic_block(f"tile.{part}") for part in ("if", "do", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    k, sums = builder.phi(_I64), [builder.phi(x.type) for x in begin]
    builder.cbranch(builder.icmp_signed("<", k, end), loop, done)
    builder.position_at_end(loop)
    results = body(k, sums)
    following = builder.add(k, _I64(step))
    builder.branch(head)
    for phi, at_first, later in [
        (k, first, following),
        *zip(sums, begin, results, strict=True),
    ]:
        phi.add_incoming(at_first, start)
        phi.add_incoming(later, builder.basic_block)
    builder.position_at_end(done)
    return sums


def _store_sums(builder: Any, where: Any, vectors: list[Any], adds: Any) -> None:
    """Write the sum of each vector's lanes, one after the other, as `total` adds them.

    Four vectors are added together: with their halves in one register, an addition serves two.
    """
    while len(vectors) >= 4:
        (a, b, c, d), vectors = vectors[:4], vectors[4:]
        half, quarter = LANES // 2, LANES // 4
        pairs = []
        for low, high in ((a, b), (c, d)):
            lanes = [*range(half), *range(LANES, LANES + half)]
            pairs.append(
                builder.fadd(
                    _shuffle(builder, low, high, lanes),
                    _shuffle(builder, low, high, [i + half for i in lanes]),
                )
            )
        lanes = [start + i for start in range(0, 2 * LANES, half) for i in range(quarter)]
        x = builder.fadd(
            _shuffle(builder, *pairs, lanes),
            _shuffle(builder, *pairs, [i + quarter for i in lanes]),
        )  # a quarter of the register for each of a, b, c, d
        width = quarter
        while width > 1:
            width //= 2
            x = builder.fadd(x, _shuffle(builder, x, x, [i ^ width for i in range(LANES)]))
        four = _shuffle(builder, x, x, [0, quarter, 2 * quarter, 3 * quarter])
        _add(builder, builder.bitcast(where, four.type.as_pointer()), four, adds)
        where = builder.gep(where, [_I64(4)])
    for i, x in enumerate(vectors):
        _add(builder, builder.gep(where, [_I64(i)]), _reduce(builder, x, builder.fadd), adds)


def _add(builder: Any, where: Any, value: Any, adds: Any) -> None:
    """Write a value, or increase what is there by it."""
    with builder.if_else(adds) as (add, write):
        with add:
            old = builder.load(where, align=4)
            builder.store(builder.fadd(old, value), where, align=4)
        with write:
            builder.store(value, where, align=4)
