"""The two products of a forward pass, a tile at a time: the sums of a few rows and columns stay in
registers, and each number that is loaded serves a whole row or column of them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mqa_kernels.cpu.simd import (
    HAS_VNNI,
    I32,
    I64,
    INTEGERS,
    LANES,
    SIZES,
    VECTOR,
    emit_call,
    emit_load,
    emit_load_up_to,
    emit_reduction,
    emit_shuffle,
    emit_splat,
)


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

    A sum has `LANES` parts, of every `LANES`-th k in rising order, which are added last: it has the
    same bits in tiles of all sizes.

    If x is int8, as `linear.round_rows` makes it, and `HAS_VNNI`, the sums are of integers.

    Args:
        following: the next tile's w, which is asked for from memory meanwhile.
        end: offset in bytes from x[r, 0] to the int32 that corrects a row's integer sum.
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
                _prefetch(builder, next_rows, k, LANES, 64 // SIZES[w.dtype])
            columns = [emit_load(builder, w.dtype, builder.gep(row, [k]), count) for row in w_rows]
            values = [emit_load(builder, x.dtype, builder.gep(row, [k]), count) for row in x_rows]
            return [
                emit_call(builder, "fma", values[i // N], columns[i % N], sums[i])
                for i in range(R * N)
            ]

        def last_products(k: Any, sums: list[Any]) -> list[Any]:
            return products(k, sums, builder.sub(length, k))

        def integer_products(k: Any, sums: list[Any]) -> list[Any]:
            if N > 1:
                _prefetch(builder, next_rows, k, 4 * LANES, 64)
            # The instruction multiplies unsigned by signed numbers: w + 128 by x.
            columns = [_integers(builder, builder.gep(row, [k])) for row in w_rows]
            columns = [
                builder.xor(c, ir.Constant(INTEGERS, [-0x7F7F7F80] * LANES)) for c in columns
            ]
            values = [_integers(builder, builder.gep(row, [k])) for row in x_rows]
            return [
                builder.asm(
                    ir.FunctionType(INTEGERS, [INTEGERS] * 3), "vpdpbusd $3, $2, $0",
                    "=v,0,v,v", [sums[i], columns[i % N], values[i // N]], False,
                )
                for i in range(R * N)
            ]  # fmt: skip

        if in_integers:
            # The first lane begins with the correction for the 128 added to each weight.
            begin = []
            for row in x_rows:
                where = builder.bitcast(builder.gep(row, [end]), I32.as_pointer())
                none = ir.Constant(INTEGERS, [0] * LANES)
                begin += [builder.insert_element(none, builder.load(where), I32(0))] * N
            sums = _loop(builder, I64(0), length, 4 * LANES, begin, integer_products)
            sums = [builder.sitofp(x, VECTOR) for x in sums]
        else:
            whole = builder.and_(length, I64(-LANES))
            sums = _loop(builder, I64(0), whole, LANES, _zeros(R * N), products)
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
    turn = builder.urem(builder.udiv(k, I64(step)), I64(share))
    here = builder.and_(k, I64(-line))
    for i in range(0, len(rows), share):
        row = rows[i]
        for j in range(1, min(share, len(rows) - i)):
            is_turn = builder.icmp_signed("==", turn, I64(j))
            row = builder.select(is_turn, rows[i + j], row)
        place = builder.bitcast(builder.gep(row, [here]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [place, I32(0), I32(2), I32(1)])  # read, second-level cache, data


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
            places = [builder.gep(row, [I64(n * LANES)]) for n in range(N)]
            if N == 1:
                values = [emit_load_up_to(builder, v.dtype, places[0], end)]
            else:
                values = [emit_load(builder, v.dtype, place) for place in places]
            weights = [emit_splat(builder, builder.load(builder.gep(base, [s]))) for base in p_rows]
            return [
                emit_call(builder, "fma", weights[i // N], values[i % N], sums[i])
                for i in range(R * N)
            ]

        sums = _loop(builder, I64(0), length, 1, _zeros(R * N), products)
        for r, row in enumerate(_rows(builder, out_base, out_step, R)):
            for n in range(N):
                where = builder.gep(row, [I64(n * LANES)])
                where = builder.bitcast(where, VECTOR.as_pointer())
                builder.store(sums[r * N + n], where, align=4)
        return context.get_dummy_value()

    n = types.int64
    return types.void(p, n, v, n, n, n, out, n, rows, vectors), emit


def _rows(builder: Any, base: Any, step: Any, count: int) -> list[Any]:
    """Pointers to the first rows of a matrix."""
    return [builder.gep(base, [builder.mul(step, I64(i))]) for i in range(count)]


def _zeros(count: int) -> list[Any]:
    return [ir.Constant(VECTOR, [0.0] * LANES)] * count


def _integers(builder: Any, where: Any) -> Any:
    """The bytes of a vector, four to a lane."""
    return builder.load(builder.bitcast(where, INTEGERS.as_pointer()), align=1)


def _loop(builder: Any, first: Any, end: Any, step: int, begin: list[Any], body: Any) -> list[Any]:
    """The vectors after `sums = body(k, sums)` for k in range(first, end, step)."""
    start = builder.basic_block
    head, loop, done = (builder.append_basic_block(f"tile.{part}") for part in ("if", "do", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    k, sums = builder.phi(I64), [builder.phi(x.type) for x in begin]
    builder.cbranch(builder.icmp_signed("<", k, end), loop, done)
    builder.position_at_end(loop)
    results = body(k, sums)
    following = builder.add(k, I64(step))
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
                    emit_shuffle(builder, low, high, lanes),
                    emit_shuffle(builder, low, high, [i + half for i in lanes]),
                )
            )
        lanes = [start + i for start in range(0, 2 * LANES, half) for i in range(quarter)]
        x = builder.fadd(
            emit_shuffle(builder, *pairs, lanes),
            emit_shuffle(builder, *pairs, [i + quarter for i in lanes]),
        )  # a quarter of the register for each of a, b, c, d
        width = quarter
        while width > 1:
            width //= 2
            x = builder.fadd(x, emit_shuffle(builder, x, x, [i ^ width for i in range(LANES)]))
        four = emit_shuffle(builder, x, x, [0, quarter, 2 * quarter, 3 * quarter])
        _add(builder, builder.bitcast(where, four.type.as_pointer()), four, adds)
        where = builder.gep(where, [I64(4)])
    for i, x in enumerate(vectors):
        _add(builder, builder.gep(where, [I64(i)]), emit_reduction(builder, x, builder.fadd), adds)


def _add(builder: Any, where: Any, value: Any, adds: Any) -> None:
    """Write a value, or increase what is there by it."""
    with builder.if_else(adds) as (add, write):
        with add:
            old = builder.load(where, align=4)
            builder.store(builder.fadd(old, value), where, align=4)
        with write:
            builder.store(value, where, align=4)
