"""Single instructions of the interpreter against Python's integers, NumPy and PyTorch."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx.parse import UnknownPTXError
from tests.ptx.snippets import lanes, run

EDGES = [
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFE,
    0xFFFF_FFFF,
    0x1234_5678,
]
GENERATOR = np.random.default_rng(0)
NAN, INF = float("nan"), float("inf")
TINY = 2.0**-130  # subnormal in float32


def pairs(dtype: str = "u4") -> tuple[np.ndarray, np.ndarray]:
    """All pairs of edges, and random numbers, as 192 threads' operands."""
    a, b = np.array(list(itertools.product(EDGES, EDGES)), "u4").T
    more = GENERATOR.integers(0, 2**32, (2, 192 - len(a)), "u4")
    return np.append(a, more[0]).view(dtype), np.append(b, more[1]).view(dtype)


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.u32", lambda a, b: a * b >> 32),
        ("mul.hi.s32", lambda a, b: signed(a) * signed(b) >> 32),
        ("min.s32", lambda a, b: min(signed(a), signed(b))),
        ("max.s32", lambda a, b: max(signed(a), signed(b))),
        ("min.relu.s32", lambda a, b: max(min(signed(a), signed(b)), 0)),
        ("and.b32", lambda a, b: a & b),
        ("or.b32", lambda a, b: a | b),
        ("xor.b32", lambda a, b: a ^ b),
        ("shl.b32", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32", lambda a, b: a >> min(b, 32)),
        ("shr.s32", lambda a, b: signed(a) >> min(b, 31)),
    ],
)
def test_integer_instructions_equal_pythons(instruction, expected):
    a, b = pairs()
    if instruction.startswith("sh"):
        b = b % 40
    out = run(f"{instruction} %r3, %r1, %r2;", {"%r1": a, "%r2": b}, threads=192)["%r3"]
    assert out.tolist() == [
        expected(int(x), int(y)) & 0xFFFF_FFFF for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_products_of_twice_the_width_and_sums(kind):
    a, b = pairs()
    number = signed if kind == "s32" else int
    inputs = {"%r1": a, "%r2": b, "%rd1": np.full(192, 2**63 + 5, "u8")}
    out = run(f"mad.wide.{kind} %rd2, %r1, %r2, %rd1; mul.wide.{kind} %rd3, %r1, %r2;", inputs, 192)
    products = [number(int(x)) * number(int(y)) for x, y in zip(a, b, strict=True)]
    assert out["%rd3"].tolist() == [p % 2**64 for p in products]
    assert out["%rd2"].tolist() == [(p + 2**63 + 5) % 2**64 for p in products]


def test_integer_division_truncates_towards_zero():
    a, b = pairs()
    b = np.where(b == 0, 3, b).astype("u4")
    out = run(
        "div.s32 %r3, %r1, %r2; rem.s32 %r4, %r1, %r2; rem.u32 %r5, %r1, %r2;",
        {"%r1": a, "%r2": b},
        192,
    )
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        quotient = int(Fraction(signed(x), signed(y)))
        assert int(out["%r3"][i]) == quotient & 0xFFFF_FFFF
        assert int(out["%r4"][i]) == (signed(x) - quotient * signed(y)) & 0xFFFF_FFFF
        assert int(out["%r5"][i]) == x % y


@pytest.mark.parametrize("selector", [0x4140, 0x4342, 0x7610, 0x0123, 0x89AB, 0xFEDC, 0x3B7F])
def test_prmt_picks_bytes_or_their_signs(selector):
    a, b = pairs()
    out = run(f"prmt.b32 %r3, %r1, %r2, {selector:#x};", {"%r1": a, "%r2": b}, 192)["%r3"]
    for x, y, got in zip(a.tolist(), b.tolist(), out.tolist(), strict=True):
        pool = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        expected = []
        for nibble in range(4):
            choice = selector >> 4 * nibble & 15
            byte = pool[choice & 7]
            expected.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
        assert got.to_bytes(4, "little") == bytes(expected)


def test_lop3_computes_every_function_of_three_bits():
    inputs = {"%r1": lanes([0xF0], "u4"), "%r2": lanes([0xCC], "u4"), "%r3": lanes([0xAA], "u4")}
    for table in range(256):  # the operands' bits run through all eight combinations
        out = run(f"lop3.b32 %r4, %r1, %r2, %r3, {table};", inputs)["%r4"]
        assert out[0] & 0xFF == table


@pytest.mark.parametrize(
    ("position", "length"), [(0, 1), (3, 5), (3, 1), (0, 32), (31, 1), (4, 28)]
)
def test_bfe_takes_a_field_of_bits(position, length):
    a, _ = pairs()
    fields = f"%r1, {position}, {length}"
    out = run(f"bfe.u32 %r2, {fields}; bfe.s32 %r3, {fields};", {"%r1": a}, 192)
    expected = [x >> position & ((1 << length) - 1) for x in a.tolist()]
    assert out["%r2"].tolist() == expected
    assert out["%r3"].view("i4").tolist() == [signed(x, length) for x in expected]


@pytest.mark.parametrize(
    ("position", "length"), [(0, 1), (27, 1), (30, 9), (0, 64), (63, 1), (4, 60)]
)
def test_bfe_takes_a_field_of_64_bits(position, length):
    low, high = pairs()
    a = low.astype("u8") | high.astype("u8") << np.uint64(32)
    fields = f"%rd1, {position}, {length}"
    out = run(f"bfe.u64 %rd2, {fields}; bfe.s64 %rd3, {fields};", {"%rd1": a}, 192)
    expected = [x >> position & ((1 << length) - 1) for x in a.tolist()]
    assert out["%rd2"].tolist() == expected
    assert out["%rd3"].view("i8").tolist() == [signed(x, length) for x in expected]


@pytest.mark.parametrize("amount", [0, 5, 31, 32, 37])
def test_shf_shifts_a_pair_of_registers(amount):
    a, b = pairs()
    code = f"shf.l.wrap.b32 %r3, %r1, %r2, {amount}; shf.r.wrap.b32 %r4, %r1, %r2, {amount};"
    out = run(code, {"%r1": a, "%r2": b}, 192)
    pair = [y << 32 | x for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert out["%r3"].tolist() == [(p << amount % 32) >> 32 & 0xFFFF_FFFF for p in pair]
    assert out["%r4"].tolist() == [p >> amount % 32 & 0xFFFF_FFFF for p in pair]


def test_vectors_are_packed_and_unpacked_lowest_first():
    code = """mov.b32 %r1, {%rs1, %rs2}; mov.b64 %rd1, {%r1, %r2};
    mov.b64 {%r3, %r4}, %rd1; mov.b32 {_, %rs3}, %r1;"""
    out = run(
        code,
        {"%rs1": lanes([0x1111], "u2"), "%rs2": lanes([0x2222], "u2"), "%r2": lanes([5], "u4")},
    )
    assert out["%r1"][0] == 0x2222_1111
    assert out["%rd1"][0] == 0x5_2222_1111
    assert (out["%r3"][0], out["%r4"][0], out["%rs3"][0]) == (0x2222_1111, 5, 0x2222)


def test_integers_are_extended_by_their_own_sign():
    code = """cvt.s64.s32 %rd1, %r1; cvt.u64.u32 %rd2, %r1; cvt.u32.u64 %r2, %rd1;
    cvt.u16.u32 %rs1, %r1; cvt.rn.f32.s32 %r3, %r1;"""
    out = run(code, {"%r1": lanes([-2], "i4")})
    assert out["%rd1"][0] == 2**64 - 2
    assert out["%rd2"][0] == 2**32 - 2
    assert out["%r2"][0] == 2**32 - 2
    assert out["%rs1"][0] == 2**16 - 2
    assert out["%r3"].view("f4")[0] == -2


def test_bytes_become_floats_of_16_bits():
    values = np.array([0, 1, -1, 127, -128, 90, -77, 5], "i4")
    code = "cvt.s8.s32 %rs1, %r1; cvt.rn.f16.s16 %rs2, %rs1; cvt.s8.s32 %r2, %r1;"
    out = run(code, {"%r1": np.resize(values + 256, 32)})
    assert np.array_equal(out["%rs2"].view("f2"), np.resize(values, 32))
    assert np.array_equal(out["%r2"].view("i4"), np.resize(values, 32))  # with the sign extended


FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    1e-38,
    TINY,
    -TINY,
    3e38,
    65504.0,
    65520.0,
    1 + 2**-8,
    1 + 3 * 2**-8,
    INF,
    -INF,
    NAN,
]


def floats(count: int = 192) -> np.ndarray:
    some = GENERATOR.standard_normal(count - len(FLOATS)) * 2.0 ** GENERATOR.integers(
        -40, 40, count - len(FLOATS)
    )
    return np.append(FLOATS, some).astype("f4")


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_to_16_bits_round_as_pytorch_does(kind, dtype):
    x = floats()
    out = run(f"cvt.rn.{kind}.f32 %rs1, %r1; cvt.f32.{kind} %r2, %rs1;"
              f"cvt.rn.{kind}x2.f32 %r3, %r1, %r4;",
              {"%r1": x, "%r4": x[::-1].copy()}, 192)  # fmt: skip
    expected = torch.from_numpy(x).to(dtype)
    values = torch.from_numpy(out["%rs1"].view("i2").copy()).view(dtype)
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())
    assert np.array_equal(out["%r2"].view("f4"), expected.float().numpy(), equal_nan=True)
    halves = out["%r3"].view("u2").reshape(-1, 2)  # the second operand is the lower half
    assert (halves[:, 1] == out["%rs1"]).all()
    assert (halves[:, 0] == out["%rs1"][::-1]).all()


@pytest.mark.parametrize("name", ["add", "sub"])
def test_pairs_of_bfloat16(name):
    a, b = (torch.randn(64).bfloat16() for _ in range(2))
    bits = [np.resize(x.view(torch.int16).numpy().view("u4"), 32) for x in (a, b)]
    out = run(f"{name}.bf16x2 %r3, %r1, %r2;", {"%r1": bits[0], "%r2": bits[1]})["%r3"]
    expected = getattr(torch, name)(a, b)
    assert torch.equal(torch.from_numpy(out.view("i2").copy()).view(torch.bfloat16), expected)


def test_fma_rounds_once():
    a, b, c = (GENERATOR.standard_normal(192).astype("f4") for _ in range(3))
    c = np.where(np.arange(192) % 2, -(a * b), c).astype("f4")  # cancels all but the product's tail
    out = run("fma.rn.f32 %r4, %r1, %r2, %r3;", {"%r1": a, "%r2": b, "%r3": c}, 192)["%r4"].view(
        "f4"
    )
    for x, y, z, got in zip(a, b, c, out, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        neighbours = [np.nextafter(got, np.float32(s)) for s in (-INF, INF)]
        assert all(
            abs(Fraction(float(got)) - exact) <= abs(Fraction(float(n)) - exact) for n in neighbours
        )


@pytest.mark.parametrize(
    ("instruction", "x", "expected"),
    [
        ("ex2.approx.f32", -130.0, TINY),
        ("ex2.approx.ftz.f32", -130.0, 0.0),
        ("ex2.approx.ftz.f32", -INF, 0.0),
        ("ex2.approx.ftz.f32", 3.5, 2**3.5),
        ("rcp.approx.ftz.f32", 2.0**127, 0.0),
        ("rcp.approx.ftz.f32", TINY, INF),
        ("rcp.approx.ftz.f32", -TINY, -INF),
        ("rsqrt.approx.ftz.f32", TINY, INF),
        ("rsqrt.approx.f32", 2.0**-130, 2.0**65),
        ("lg2.approx.ftz.f32", TINY, -INF),
        ("lg2.approx.f32", TINY, -130.0),
        ("abs.ftz.f32", -TINY, 0.0),
        ("neg.f32", -TINY, TINY),
    ],
)
def test_ftz_flushes_subnormal_operands_and_results(instruction, x, expected):
    out = run(f"{instruction} %r2, %r1;", {"%r1": lanes([x], "f4")})["%r2"].view("f4")[0]
    assert out == np.float32(expected)


def test_fma_with_ftz_flushes_its_operands():
    inputs = {"%r1": lanes([TINY], "f4"), "%r2": lanes([2.0**100], "f4"), "%r3": lanes([1.0], "f4")}
    out = run("fma.rn.ftz.f32 %r4, %r1, %r2, %r3; fma.rn.f32 %r5, %r1, %r2, %r3;", inputs)
    assert out["%r4"].view("f4")[0] == 1
    assert out["%r5"].view("f4")[0] == np.float32(1 + 2.0**-30)


def test_minimum_and_maximum_prefer_numbers_to_nan():
    inputs = {"%r1": lanes([NAN, 1, 2], "f4"), "%r2": lanes([3, NAN, -1], "f4")}
    out = run("min.f32 %r3, %r1, %r2; max.f32 %r4, %r1, %r2;", inputs)
    assert out["%r3"].view("f4")[:3].tolist() == [3, 1, -1]
    assert out["%r4"].view("f4")[:3].tolist() == [3, 1, 2]


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_comparisons_of_floats_with_and_without_nan(kind):
    values = list(itertools.product([0.0, -0.0, 1.0, -1.0, NAN], repeat=2))[:32]
    a, b = (lanes([v[k] for v in values], "f4") for k in range(2))
    code, register = "", "%r"
    if kind != "f32":
        code, register = f"cvt.rn.{kind}.f32 %rs1, %r1; cvt.rn.{kind}.f32 %rs2, %r2;", "%rs"
    expected = {
        "eq": a == b, "lt": a < b, "ge": a >= b, "gt": a > b, "le": a <= b, "neu": a != b,
        "ltu": ~(a >= b), "geu": ~(a < b), "nan": np.isnan(a) | np.isnan(b),
        "num": ~(np.isnan(a) | np.isnan(b)),
    }  # fmt: skip
    for name, truth in expected.items():
        out = run(f"{code} setp.{name}.{kind} %p1, {register}1, {register}2;", {"%r1": a, "%r2": b})
        assert np.array_equal(out["%p1"], truth), name


def test_comparisons_of_integers_and_selection():
    a, b = pairs()
    code = """setp.lt.s32 %p1, %r1, %r2; setp.lt.u32 %p2, %r1, %r2;
    selp.b32 %r3, %r1, %r2, %p1; not.pred %p3, %p1; and.pred %p4, %p2, %p3;"""
    out = run(code, {"%r1": a, "%r2": b}, 192)
    assert np.array_equal(out["%p1"], a.view("i4") < b.view("i4"))
    assert np.array_equal(out["%p2"], a < b)
    assert np.array_equal(out["%r3"], np.where(out["%p1"], a, b))
    assert np.array_equal(out["%p4"], (a < b) & ~(a.view("i4") < b.view("i4")))


def test_shuffles_stay_within_a_warp():
    x = np.arange(64, dtype="u4")
    out = run(
        "shfl.sync.bfly.b32 %r2, %r1, 4, 31, -1; shfl.sync.idx.b32 %r3, %r1, 3, 31, -1;",
        {"%r1": x},
        64,
    )
    assert np.array_equal(out["%r2"], x ^ 4)
    assert np.array_equal(out["%r3"], np.repeat([3, 35], 32))


def test_a_predicate_decides_which_threads_run_an_instruction():
    code = """mov.u32 %r1, %tid.x; mov.b32 %r2, 7; setp.lt.u32 %p1, %r1, 5;
    @%p1 mov.b32 %r2, 9; @!%p1 add.s32 %r2, %r2, 1;"""
    assert run(code)["%r2"].tolist() == [9] * 5 + [8] * 27


def test_threads_diverge_and_meet_again():
    code = """
    mov.u32 %r1, %tid.x; mov.b32 %r2, 0;
    $loop:
    add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, %r1; @%p1 bra $loop;
    mul.lo.s32 %r2, %r2, 10;"""
    assert run(code)["%r2"].tolist() == [10] + [10 * i for i in range(1, 32)]


@pytest.mark.parametrize(
    "code",
    [
        "popc.b32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "fma.rz.f32 %r1, %r2, %r3, %r4;",
        "ld.local.b32 %r1, [%rd1];",
        "ld.volatile.global.b32 %r1, [%rd1];",
        "atom.global.add.u32 %r1, [%rd1], 1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "cp.async.bulk.commit_group;",
        "membar.gl;",
        "mov.b32 %r1, %clock;",
        "fence.acq_rel.gpu;",
        "mbarrier.init.shared.b64 [%r1], 1;",
    ],
)
def test_unknown_instructions_raise(code):
    with pytest.raises(UnknownPTXError):
        run(code)
