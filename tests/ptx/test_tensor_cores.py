"""Fragments and layouts of the tensor-core instructions, element by element as in the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.memory import RaceError
from tests.ptx.parse import UnknownPTXError
from tests.ptx.snippets import run
from tests.ptx.tensor_cores import SWIZZLES

GENERATOR = np.random.default_rng(0)
KINDS = [("bf16", torch.bfloat16), ("f16", torch.float16)]


def bits_of(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """16-bit floats as integers."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view("u2")


def matrix(rows: int, columns: int) -> np.ndarray:
    """Small integers, whose products and sums are exact."""
    return GENERATOR.integers(-8, 9, (rows, columns)).astype("f4")


# Row and column of element i (0, 1, ...) that a lane holds (PTX ISA 9.7.14.5.8).


def place_in_a(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8)
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_in_b(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def place_in_c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


def fragment(values: np.ndarray, place, count: int) -> np.ndarray:
    """(32, count): what each lane holds of a matrix."""
    return np.array([[values[place(lane, i)] for i in range(count)] for lane in range(32)])


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_mma_multiplies_fragments(kind, dtype):
    a, b, c = matrix(16, 16), matrix(16, 8), matrix(16, 8)
    held_a = fragment(bits_of(a, dtype), place_in_a, 8).view("u4")  # (32, 4)
    held_b = fragment(bits_of(b, dtype), place_in_b, 4).view("u4")
    held_c = fragment(c, place_in_c, 4)
    names = {f"%r{i + 1}": held_a[:, i] for i in range(4)} | {
        f"%r{i + 5}": held_b[:, i] for i in range(2)
    }
    names |= {f"%r{i + 7}": held_c[:, i] for i in range(4)}
    names = {name: np.ascontiguousarray(values) for name, values in names.items()}
    code = f"""mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
    {{%r11,%r12,%r13,%r14}}, {{%r1,%r2,%r3,%r4}}, {{%r5,%r6}}, {{%r7,%r8,%r9,%r10}};"""
    out = run(code, names)
    got = np.stack([out[f"%r{i + 11}"].view("f4") for i in range(4)], 1)
    assert np.array_equal(got, fragment(a @ b + c, place_in_c, 4))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix_spread_rows_over_lanes(count, transposed):
    stored = GENERATOR.integers(0, 2**16, (4, 8, 8)).astype("u2")
    order = GENERATOR.permutation(32)  # rows of the matrices, anywhere in shared memory
    shared = np.zeros((32, 8), "u2")
    shared[order] = stored.reshape(32, 8)
    suffix = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    registers = ",".join(f"%r{i + 2}" for i in range(count))
    code = f"ldmatrix.sync.aligned.{suffix} {{{registers}}}, [%r1];"
    out = run(code, {"%r1": (16 * order).astype("u4")}, shared=shared)
    for k in range(count):
        source = stored[k].T if transposed else stored[k]
        for lane in range(32):
            low, high = source[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert out[f"%r{k + 2}"][lane] == int(low) | int(high) << 16
    # Storing what has been loaded, elsewhere and with rows and columns as they were.
    code += f"stmatrix.sync.aligned.{suffix} [%r9+512], {{{registers}}};"
    inputs = {"%r1": (16 * order).astype("u4"), "%r9": np.arange(0, 512, 16, "u4")}
    after = run(code, inputs, shared=np.append(shared.ravel(), np.zeros(256, "u2")))
    data = after.group.context.shared.data[512:].view("u2").reshape(4, 8, 8)
    assert np.array_equal(data[:count], stored[:count])
    assert not data[count:].any()


# --- wgmma -------------------------------------------------------------------------------------


def swizzled(tile: np.ndarray, width: int) -> np.ndarray:
    """Rows of `width` bytes as the hardware expects them: 16-byte pieces of every 8 (4, 2) rows
    permuted, so that a column of pieces meets all banks (PTX ISA 5.5.7, swizzling modes)."""
    pieces = tile.view("u1").reshape(-1, width // 16, 16)
    rows_per_line, count = 128 // width, width // 16
    out = np.empty_like(pieces)
    for r in range(len(pieces)):
        for piece in range(count):
            out[r, piece ^ (r // rows_per_line % count)] = pieces[r, piece]
    return out.reshape(-1)


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def shared_operand(x: np.ndarray, mode: int, transposed: bool) -> tuple[np.ndarray, list[int]]:
    """x (rows, K) laid out in shared memory, and the descriptors of its steps of 16 along K.

    Transposed, K is the slow axis: the rows are cut into tiles as wide as the swizzle.
    """
    width, _ = SWIZZLES[mode]
    per_line = width // 2
    K = x.shape[1]
    lines = x.T if transposed else x
    tiles = [
        np.ascontiguousarray(lines[:, i : i + per_line]) for i in range(0, lines.shape[1], per_line)
    ]
    data = np.concatenate([swizzled(tile, width) for tile in tiles])
    size = len(data) // len(tiles)  # bytes of a tile
    descriptors = []
    for k in range(0, K, 16):
        if transposed:
            descriptors.append(descriptor(k * width, size, 8 * width, mode))
        else:
            start = k // per_line * size + k % per_line * 2
            descriptors.append(descriptor(start, 16, 8 * width, mode))
    return data, descriptors


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("mode", SWIZZLES)
@pytest.mark.parametrize("source", ["registers", "shared", "shared, transposed"])
def test_wgmma_multiplies_matrices_in_every_layout(source, mode, transpose_b, kind, dtype):
    N, K = 64, 64
    a, b = matrix(64, K), matrix(N, K)
    data_b, descriptors_b = shared_operand(bits_of(b, dtype), mode, transpose_b)
    transpose_a = source.endswith("transposed")
    data_a, descriptors_a = shared_operand(bits_of(a, dtype), mode, transpose_a)
    # A starts after B, both aligned to a swizzle's whole pattern of 1024 bytes.
    assert len(data_b) % 1024 == 0
    sums = ",".join(f"%r{i}" for i in range(N // 2))
    code, registers = "", {}
    for step in range(K // 16):
        scale = int(step > 0)
        b_text = f"{descriptors_b[step]}"
        if source == "registers":
            part = bits_of(a[:, 16 * step : 16 * step + 16], dtype)
            held = np.concatenate(
                [fragment(part[16 * w : 16 * w + 16], place_in_a, 8).view("u4") for w in range(4)]
            )
            names = [f"%r{40 + 4 * step + i}" for i in range(4)]
            registers |= {name: np.ascontiguousarray(held[:, i]) for i, name in enumerate(names)}
            operands = f"{{{','.join(names)}}}, {b_text}, {scale}, 1, 1, {int(transpose_b)}"
        else:
            a_text = f"{descriptors_a[step] + (len(data_b) >> 4)}"
            operands = f"{a_text}, {b_text}, {scale}, 1, 1, {int(transpose_a)}, {int(transpose_b)}"
        code += f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{kind}.{kind} {{{sums}}}, {operands};"
    code += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    out = run(code, registers, 128, np.concatenate([data_b, data_a]))
    expected = a @ b.T
    for w in range(4):
        for group in range(N // 8):
            tile = expected[16 * w : 16 * w + 16, 8 * group : 8 * group + 8]
            held = np.stack(
                [out[f"%r{4 * group + i}"].view("f4")[32 * w : 32 * w + 32] for i in range(4)], 1
            )
            assert np.array_equal(held, fragment(tile, place_in_c, 4))


SUMS = ",".join(f"%r{i}" for i in range(4))
WGMMA = f"""wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {{{SUMS}}}, {{%r10,%r11,%r12,%r13}}, %rd1, 0, 1, 1, 0;"""
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"


def wgmma_with(code: str, shared_bytes: int = 1024):
    registers = {f"%r{10 + i}": np.full(128, 0x3F803F80, "u4") for i in range(4)}
    registers["%rd1"] = np.full(128, descriptor(0, 16, 1024, 1), "u8")
    registers["%r20"] = np.arange(128, dtype="u4") * 4
    return run(code, registers, 128, np.zeros(shared_bytes, "u1"))


def test_accumulators_hold_nan_until_they_are_waited_for():
    out = wgmma_with(
        f"{WGMMA} mov.b32 %r30, %r0; {COMMIT} mov.b32 %r31, %r0; {WAIT} mov.b32 %r32, %r0;"
    )
    assert np.isnan(out["%r30"].view("f4")).all()
    assert np.isnan(out["%r31"].view("f4")).all()
    assert (out["%r32"].view("f4") == 0).all()


@pytest.mark.parametrize(
    ("between", "message"),
    [
        ("bar.sync 0; st.shared.b32 [%r20], %r20;", "written while wgmma reads it"),
        ("mov.b32 %r11, 0;", "A's registers change"),
        ("mov.b32 %r2, 0;", "accumulators of a wgmma in flight change"),
    ],
)
def test_what_a_wgmma_in_flight_uses_must_not_change(between, message):
    with pytest.raises(RaceError, match=message):
        wgmma_with(f"{WGMMA} {COMMIT} {between} {WAIT}")
    wgmma_with(f"{WGMMA} {COMMIT} {WAIT} bar.sync 0; {between}")


def test_other_warps_may_overwrite_operands_only_after_a_barrier():
    with pytest.raises(RaceError, match="another warp read it"):
        wgmma_with(f"{WGMMA} {COMMIT} {WAIT} st.shared.b32 [%r20], %r20;")


def test_wgmma_needs_a_fence_after_a_store():
    store, barrier, fence = (
        "st.shared.b32 [%r20], %r20;",
        "bar.sync 0;",
        "fence.proxy.async.shared::cta;",
    )
    rest = f"{WGMMA} {COMMIT} {WAIT}"
    with pytest.raises(RaceError, match=r"without fence\.proxy\.async"):
        wgmma_with(f"{store} {barrier} {rest}")
    with pytest.raises(RaceError, match="another warp wrote it"):
        wgmma_with(f"{store} {fence} {rest}")
    wgmma_with(f"{store} {fence} {barrier} {rest}")
    wgmma_with(f"{store} {barrier} {fence} {rest}")


def test_a_kernel_must_wait_for_its_products():
    with pytest.raises(RaceError, match="ends with wgmma in flight"):
        wgmma_with(f"{WGMMA} {COMMIT}")


def test_collective_instructions_in_divergent_code_are_unknown():
    with pytest.raises(UnknownPTXError, match="in divergent code"):
        wgmma_with(f"setp.lt.u32 %p1, %r20, 4; @%p1 {WGMMA} {COMMIT} {WAIT}")
