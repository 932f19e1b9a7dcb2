"""The forward loop in Gluon, after FlashAttention-3 (Shah et al. 2024).

Triton has a product finished before anything but another product reads it: a block's softmax waits
for its scores, the tensor cores for the softmax. Gluon, the layer below, says itself when to wait.
Here the scores of one block and the product of the block before with its values are under way
together, and the softmax of the one runs beside the other.

Dimensions as in `mqa_kernels.forward`, with G = 1. A tile has two halves of 64 folded rows, each
with four warps to itself; one more warp has keys and values loaded (TMA) into slots of shared
memory. A barrier says when a slot is full, another when both halves are through with it.

Runs on sm_90 only, and not in Triton's interpreter: `tests/test_benchmarks_gluon.py` checks it with
a stand-in for Gluon, which waits as little as it may.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mqa_kernels import launch

LOG2E = gl.constexpr(1.4426950408889634)
HALF = gl.constexpr(64)  # rows, which is what an instruction of four warps takes
# Registers per thread of warps that compute and of the one that loads. Together with the first
# half's, which has what is left, they are all there are.
REGISTERS = gl.constexpr((240, 24))


@gluon.constexpr_function
def sums_layout(columns):  # type: ignore[no-untyped-def]
    """Where a product (64, columns) lies: 16 rows in each of four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def rows_layout(columns):  # type: ignore[no-untyped-def]
    """Where one number for each row of it lies."""
    return gl.SliceLayout(1, sums_layout(columns))


@gluon.constexpr_function
def left_layout(columns):  # type: ignore[no-untyped-def]
    """Where the left factor of such a product lies, in registers."""
    return gl.DotOperandLayout(0, sums_layout(columns), 2)


@gluon.constexpr_function
def stored_layout(D):  # type: ignore[no-untyped-def]
    """In which (64, D) is stored: 8 neighbours to a thread, whole rows side by side."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])


@gluon.jit
def load_tiles(  # type: ignore[no-untyped-def]
    q_blocks, k_blocks, v_blocks, q, k, v, q_full, full, empty, first_row, first_key, count
):  # fmt: skip
    """Have queries, keys and values loaded, as soon as there is room for them."""
    STAGES: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    for half in gl.static_range(2):
        mbarrier.expect(q_full.index(half), q_blocks.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_blocks, [first_row + half * HALF, 0], q_full.index(half), q.index(half)
        )
    for block in range(count):
        slot, turn = block % STAGES, block // STAGES % 2
        mbarrier.wait(empty.index(slot), turn ^ 1)
        mbarrier.expect(full.index(slot), k_blocks.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_blocks, [first_key + block * N, 0], full.index(slot), k.index(slot)
        )
        # The barriers of the values lie behind those of the keys.
        mbarrier.wait(empty.index(STAGES + slot), turn ^ 1)
        mbarrier.expect(full.index(STAGES + slot), v_blocks.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_blocks, [first_key + block * N, 0], full.index(STAGES + slot), v.index(slot)
        )


@gluon.jit  # type: ignore[untyped-decorator]
def softmax_step(  # type: ignore[no-untyped-def]
    scores, top, total, block, t, scale_log2, N: gl.constexpr, MASKED: gl.constexpr
):
    """A block's probabilities (64, N), and what they make of each row's maximum and sum."""
    if MASKED:
        keys = block * N + gl.arange(0, N, layout=gl.SliceLayout(0, sums_layout(N)))
        scores = gl.where(keys[None, :] <= t[:, None], scores, float("-inf"))
    # Every row sees key 0, in the first block, so that no maximum is -inf.
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)  # (64,)
    p = gl.exp2(scores * scale_log2 - new_top[:, None])  # (64, N)
    shrink = gl.exp2(top - new_top)  # (64,)
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit  # type: ignore[untyped-decorator]
def see_block(  # type: ignore[no-untyped-def]
    p, acc, top, total, q, k, v, full, empty, block, t, scale_log2,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """From the probabilities of the block before to those of this one."""
    slot, turn = block % STAGES, block // STAGES % 2
    before, turn_before = (block - 1) % STAGES, (block - 1) // STAGES % 2
    mbarrier.wait(full.index(slot), turn)
    scores = warpgroup_mma(
        q, k.index(slot).permute((1, 0)), gl.zeros([HALF, N], gl.float32, sums_layout(N)),
        use_acc=False, is_async=True,
    )  # fmt: skip
    mbarrier.wait(full.index(STAGES + before), turn_before)
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))  # (64, N)
    mbarrier.arrive(empty.index(slot))
    new_p, top, total, shrink = softmax_step(scores, top, total, block, t, scale_log2, N, MASKED)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))  # (64, D), (64, N)
    mbarrier.arrive(empty.index(STAGES + before))
    acc = acc * gl.convert_layout(shrink, rows_layout(D))[:, None]
    return gl.convert_layout(new_p.to(v.dtype), left_layout(D)), acc, top, total


@gluon.jit
def attend(  # type: ignore[no-untyped-def]
    q, k, v, q_full, full, empty, out_ptr, lse_ptr, count, b, half, T, H, scale_log2
):  # fmt: skip
    """Attention of half a tile, counted from the row's first, by its four warps."""
    STAGES: gl.constexpr = k.shape[0]
    N: gl.constexpr = k.shape[1]
    D: gl.constexpr = k.shape[2]
    first = half * HALF
    t = (first + gl.arange(0, HALF, layout=rows_layout(N))) // H  # (64,)
    top = gl.full([HALF], float("-inf"), gl.float32, rows_layout(N))
    total = gl.zeros([HALF], gl.float32, rows_layout(N))
    acc = gl.zeros([HALF, D], gl.float32, sums_layout(D))

    q = q.index(half % 2)  # (64, D)
    mbarrier.wait(q_full.index(half % 2), 0)
    mbarrier.wait(full.index(0), 0)
    scores = warpgroup_mma(
        q, k.index(0).permute((1, 0)), gl.zeros([HALF, N], gl.float32, sums_layout(N)),
        use_acc=False, is_async=True,
    )  # fmt: skip
    scores = warpgroup_mma_wait(0, deps=(scores,))  # (64, N)
    mbarrier.arrive(empty.index(0))
    p, top, total, _ = softmax_step(scores, top, total, 0, t, scale_log2, N, True)
    p = gl.convert_layout(p.to(v.dtype), left_layout(D))

    middle = gl.maximum(1, gl.minimum((first // H + 1) // N, count))  # seen whole up to here
    for block in range(1, middle):
        p, acc, top, total = see_block(
            p, acc, top, total, q, k, v, full, empty, block, t, scale_log2, N, D, STAGES, False
        )
    for block in range(middle, count):
        p, acc, top, total = see_block(
            p, acc, top, total, q, k, v, full, empty, block, t, scale_log2, N, D, STAGES, True
        )
    last = count - 1
    mbarrier.wait(full.index(STAGES + last % STAGES), last // STAGES % 2)
    acc = warpgroup_mma(p, v.index(last % STAGES), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))  # (64, D), (64, N)

    base = b.to(gl.int64) * T * H
    rows = first + gl.arange(0, HALF, layout=rows_layout(N))
    gl.store(lse_ptr + base + rows, (top + gl.log2(total)) / LOG2E, mask=rows < T * H)
    acc = acc / gl.convert_layout(total, rows_layout(D))[:, None]
    rows = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, stored_layout(D)))
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, stored_layout(D)))
    gl.store(
        out_ptr + (base + rows)[:, None] * D + channels[None, :],
        gl.convert_layout(acc.to(v.dtype), stored_layout(D)),
        mask=(rows < T * H)[:, None],
    )


@gluon.jit  # type: ignore[untyped-decorator]
def gluon_kernel(  # type: ignore[no-untyped-def]
    q_blocks, k_blocks, v_blocks, out_ptr, lse_ptr, T, scale_log2,
    H: gl.constexpr, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Causal attention from position 0 on of one tile of 128 folded rows.

    Grid: (row tiles, B). The descriptors are of (B * T * H, D) and twice (B * T, D). What their
    blocks hold beyond a row's T is of no influence, but must be finite.
    """
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest first: they end together
    b = gl.program_id(1)
    count = gl.cdiv(gl.minimum(((tile + 1) * 2 * HALF - 1) // H + 1, T), N)  # blocks of keys

    q = gl.allocate_shared_memory(q_blocks.dtype, [2, HALF, D], q_blocks.layout)
    k = gl.allocate_shared_memory(k_blocks.dtype, [STAGES, N, D], k_blocks.layout)
    v = gl.allocate_shared_memory(v_blocks.dtype, [STAGES, N, D], v_blocks.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
    for slot in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)  # both halves have to be through with it
    fence_async_shared()

    first_row = b * T * H + tile * 2 * HALF
    upper = (
        q, k, v, q_full, full, empty, out_ptr, lse_ptr, count, b, 2 * tile, T, H, scale_log2,
    )  # fmt: skip
    lower = (
        q, k, v, q_full, full, empty, out_ptr, lse_ptr, count, b, 2 * tile + 1, T, H, scale_log2,
    )  # fmt: skip
    tiles = (
        q_blocks, k_blocks, v_blocks, q, k, v, q_full, full, empty, first_row, b * T, count,
    )  # fmt: skip
    gl.warp_specialize([(attend, upper), (attend, lower), (load_tiles, tiles)], [4, 1], REGISTERS)


def gluon_attention(q: Tensor, k: Tensor, v: Tensor, N: int, stages: int) -> Tensor:
    """Causal attention of q (B, T, H, D) over k and v (B, T, 1, D), in 16 bits, D 64 or 128.

    Queries that are parts of wider rows are copied first.

    Args:
        N: keys of a block.
        stages: blocks of keys, and of values, that there is room for.

    Raises:
        ValueError: another GPU, for which the compiler would end the process, or another D.
    """
    B, T, H, D = q.shape
    if q.is_cuda and launch.architecture(q.device) != 90:
        raise ValueError(f"{q.device} is sm_{launch.architecture(q.device)}: this is for sm_90")
    if D not in (64, 128):
        raise ValueError(f"the head dim is {D}: this is for 64 and 128")
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16

    def described(x: Tensor, rows: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([rows, D], dtype)
        return TensorDescriptor.from_tensor(x, [rows, D], layout)

    gluon_kernel[(triton.cdiv(T * H, 2 * HALF.value), B)](
        described(q.reshape(B * T * H, D), HALF.value),
        described(k.view(B * T, D), N),
        described(v.view(B * T, D), N),
        out, lse, T, D**-0.5 * LOG2E.value,
        H=H, D=D, N=N, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out
