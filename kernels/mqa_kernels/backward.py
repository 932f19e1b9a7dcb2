"""The backward kernels: dQ by row tiles, dK and dV by key blocks. Dimensions as in `forward.py`.

With P the probabilities, O their product with V and dO the gradient of the output (Dao 2023,
algorithm 2):

    dV = P^T dO        dP = dO V^T        delta = rowsum(dO * O)
    dS = P * (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

P is recomputed from Q, K and the saved log-sum-exp. The heads of a group are rows like any others,
so the matrix product sums dK and dV over them: no per-head gradients (B, T, H, D) in memory, no
atomic additions, and the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqa_kernels import launch
from mqa_kernels.launch import multiprocessors
from mqa_kernels.tiles import (
    LOG2E,
    dot,
    dropout_keeps,
    first_position,
    group_offset,
    left_padding_of,
    load_rows,
    load_seed,
    new_tokens_of,
    round_to,
    row_offsets,
    slot_pointer,
    visible_keys,
)
from mqa_kernels.tuning import key_tiles, query_tiles, row_splits


@triton.jit
def _dq_step(
    dq, q, do, lse_log2, delta, block, k_ptr, v_ptr, stride_ks, stride_vs, channels, end,
    rows, positions, scale_log2, seed, dropout_p, b, g,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dq (M, D) plus what one block of N keys adds to the tile's dQ / scale."""
    keys = block * N + tl.arange(0, N)  # (N,)
    slots = keys.to(tl.int64)[:, None]
    k_pointers = k_ptr + slots * stride_ks + channels[None, :]
    v_pointers = v_ptr + slots * stride_vs + channels[None, :]
    k = load_rows(k_pointers, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    v = load_rows(v_pointers, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    zeros = tl.zeros([q.shape[0], N], tl.float32)
    # Invalid rows have an infinite lse, and so probability 0 everywhere.
    p = tl.exp2(dot(q, tl.trans(k), zeros) * scale_log2 - lse_log2[:, None])  # (M, N)
    if MASKED:
        p = tl.where(keys[None, :] <= positions[:, None], p, 0.0)
    dp = dot(do, tl.trans(v), zeros)  # (M, N)
    if DROPOUT:
        keep = dropout_keeps(seed, b, g, rows[:, None], keys[None, :], dropout_p, G, HEADS)
        dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
    ds = p * (dp - delta[:, None])  # (M, N)
    return dot(round_to(ds, k.dtype), k, dq)  # (M, D)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, lengths_ptr,
    left_ptr, seed_ptr, offset, T, S, scale, scale_log2, dropout_p,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_ob, stride_ot, stride_oh,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of M folded rows, and the tile's delta, which `dkv_kernel` reads.

    Grid: (row tiles, B * G). Reads q, out and dO (B, T, H, D), k and v (B, S, G, D), lse (B, T, H);
    writes delta (B, T, H) and dq (B, T, H, D). out, lse, delta and dq are contiguous.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    # Slots and positions count from the end of the padding.
    left = left_padding_of(left_ptr, b)
    size = S - left
    start = first_position(start_ptr, offset, b) - left
    new = new_tokens_of(lengths_ptr, T, b)
    seed = load_seed(seed_ptr)
    H = G * HEADS

    rows = tile * M + tl.arange(0, M)  # (M,)
    t = rows // HEADS
    valid = t < new
    channels = tl.arange(0, PADDED_D)
    q_base = q_ptr + group_offset(b, g * HEADS, stride_qb, stride_qh)
    do_base = do_ptr + group_offset(b, g * HEADS, stride_ob, stride_oh)
    q_offsets = row_offsets(rows, channels, stride_qt, stride_qh, HEADS)
    do_offsets = row_offsets(rows, channels, stride_ot, stride_oh, HEADS)
    q = load_rows(q_base + q_offsets, valid, channels, D, PADDED_D, True)  # (M, D)
    do = load_rows(do_base + do_offsets, valid, channels, D, PADDED_D, True)  # (M, D)

    # Offsets in contiguous (B, T, H) and (B, T, H, D).
    row_index = b.to(tl.int64) * T * H + g * HEADS + t.to(tl.int64) * H + rows % HEADS  # (M,)
    out_offsets = row_index[:, None] * D + channels[None, :]  # (M, D)
    out = load_rows(out_ptr + out_offsets, valid, channels, D, PADDED_D, True)  # (M, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # (M,)
    stored = rows < T * HEADS
    tl.store(delta_ptr + row_index, delta, mask=stored)
    lse_log2 = tl.load(lse_ptr + row_index, mask=valid, other=float("inf")) * LOG2E  # (M,)

    seen_by_all, end = visible_keys(tile, start, new, size, M, HEADS)
    k_base = slot_pointer(k_ptr, b, left, g, stride_kb, stride_ks, stride_kg)
    v_base = slot_pointer(v_ptr, b, left, g, stride_vb, stride_vs, stride_vg)
    positions = tl.minimum(start + t, size - 1)  # (M,)
    dq = tl.zeros([M, PADDED_D], tl.float32)
    for block in range(0, seen_by_all // N):
        dq = _dq_step(
            dq, q, do, lse_log2, delta, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, HEADS, D, N, PADDED_D, False, DROPOUT,
        )  # fmt: skip
    for block in range(seen_by_all // N, tl.cdiv(end, N)):
        dq = _dq_step(
            dq, q, do, lse_log2, delta, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, HEADS, D, N, PADDED_D, True, DROPOUT,
        )  # fmt: skip
    tl.store(
        dq_ptr + out_offsets,
        round_to(dq * scale, dq_ptr.dtype.element_ty),
        mask=stored[:, None] & (channels[None, :] < D),
    )


@triton.jit
def _dkv_step(
    dk, dv, k, v, tile, q_ptr, do_ptr, lse_ptr, delta_ptr, first_row,
    stride_qt, stride_qh, stride_ot, stride_oh, channels,
    keys, start, new, left, scale_log2, seed, dropout_p, b, g,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, PADDED_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dk and dv (N, D) plus what one tile of M rows adds to the block's dK / scale and dV.

    Scores are computed transposed, with the keys as rows, because they are the left factor of the
    last two products: on sm_90 they pass from one product to the next in registers.
    """
    rows = tile * M + tl.arange(0, M)  # (M,)
    t = rows // HEADS
    valid = t < new
    q_offsets = row_offsets(rows, channels, stride_qt, stride_qh, HEADS)
    do_offsets = row_offsets(rows, channels, stride_ot, stride_oh, HEADS)
    q = load_rows(q_ptr + q_offsets, valid, channels, D, PADDED_D, True)  # (M, D)
    do = load_rows(do_ptr + do_offsets, valid, channels, D, PADDED_D, True)  # (M, D)
    row_index = first_row + t.to(tl.int64) * (G * HEADS) + rows % HEADS
    lse_log2 = tl.load(lse_ptr + row_index, mask=valid, other=float("inf")) * LOG2E  # (M,)
    zeros = tl.zeros([keys.shape[0], M], tl.float32)
    # Invalid rows have an infinite lse, and so probability 0 everywhere.
    p = tl.exp2(dot(k, tl.trans(q), zeros) * scale_log2 - lse_log2[None, :])  # (N, M)
    if MASKED:
        p = tl.where(keys[:, None] <= (start + t)[None, :], p, 0.0)
    dp = dot(v, tl.trans(do), zeros)  # (N, M)
    p_dropped = p
    if DROPOUT:
        slots = (keys - left)[:, None]
        keep = dropout_keeps(seed, b, g, rows[None, :], slots, dropout_p, G, HEADS)
        p_dropped = tl.where(keep, p / (1 - dropout_p), 0.0)
        dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
    dv = dot(round_to(p_dropped, do.dtype), do, dv)  # (N, D)
    # Loaded this late because it takes as many registers per thread as a row of scores.
    delta = tl.load(delta_ptr + row_index, mask=valid, other=0.0)  # (M,)
    ds = p * (dp - delta[None, :])  # (N, M)
    dk = dot(round_to(ds, q.dtype), q, dk)  # (N, D)
    return dk, dv


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, start_ptr, lengths_ptr,
    left_ptr, seed_ptr, offset, B, T, S, scale, scale_log2, dropout_p,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_ob, stride_ot, stride_oh,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of N keys, from one split of the row tiles that see it.

    Grid: (num_splits, B * G, key blocks); a split takes every num_splits-th tile. The first key
    blocks are seen by most rows. As the slowest axis they start first in all rows and splits, and
    the short ones fill the gaps at the end. Reads q and dO (B, T, H, D), k and v (B, S, G, D), lse
    and delta (B, T, H); writes dk and dv (num_splits, B, S, G, D).
    """
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    block = tl.program_id(2)
    start = first_position(start_ptr, offset, b)
    left = left_padding_of(left_ptr, b)
    new = new_tokens_of(lengths_ptr, T, b)
    seed = load_seed(seed_ptr)

    keys = block * N + tl.arange(0, N)  # (N,)
    valid = (keys >= left) & (keys < tl.minimum(start + new, S))
    channels = tl.arange(0, PADDED_D)
    slots = keys.to(tl.int64)[:, None]
    k_base = k_ptr + group_offset(b, g, stride_kb, stride_kg)
    v_base = v_ptr + group_offset(b, g, stride_vb, stride_vg)
    k_pointers = k_base + slots * stride_ks + channels[None, :]
    v_pointers = v_base + slots * stride_vs + channels[None, :]
    k = load_rows(k_pointers, valid, channels, D, PADDED_D, True)  # (N, D)
    v = load_rows(v_pointers, valid, channels, D, PADDED_D, True)  # (N, D)

    # Rows see some of the block from its first key's position on, all of it from its last key's.
    first_t = tl.maximum(block * N - start, 0)
    all_t = tl.maximum(block * N + N - 1 - start, 0)
    masked = next_in_split(first_t * HEADS // M, split, num_splits)
    unmasked = next_in_split(tl.cdiv(all_t * HEADS, M), split, num_splits)
    tiles = tl.cdiv(new * HEADS, M)
    q_base = q_ptr + group_offset(b, g * HEADS, stride_qb, stride_qh)
    do_base = do_ptr + group_offset(b, g * HEADS, stride_ob, stride_oh)
    first_row = b.to(tl.int64) * T * (G * HEADS) + g * HEADS
    dk = tl.zeros([N, PADDED_D], tl.float32)
    dv = tl.zeros([N, PADDED_D], tl.float32)
    for tile in range(masked, tl.minimum(unmasked, tiles), num_splits):
        dk, dv = _dkv_step(
            dk, dv, k, v, tile, q_base, do_base, lse_ptr, delta_ptr, first_row,
            stride_qt, stride_qh, stride_ot, stride_oh, channels,
            keys, start, new, left, scale_log2, seed, dropout_p, b, g,
            G, HEADS, D, M, PADDED_D, True, DROPOUT,
        )  # fmt: skip
    for tile in range(unmasked, tiles, num_splits):
        dk, dv = _dkv_step(
            dk, dv, k, v, tile, q_base, do_base, lse_ptr, delta_ptr, first_row,
            stride_qt, stride_qh, stride_ot, stride_oh, channels,
            keys, start, new, left, scale_log2, seed, dropout_p, b, g,
            G, HEADS, D, M, PADDED_D, False, DROPOUT,
        )  # fmt: skip
    out_rows = (split * B + b).to(tl.int64) * S + keys  # (N,)
    out_offsets = (out_rows * G + g)[:, None] * D + channels[None, :]  # (N, D)
    stored = (keys < S)[:, None] & (channels[None, :] < D)
    # The loops do not mask padding and keys after the last query; their sums may be infinite.
    dk = tl.where(valid[:, None], dk, 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    tl.store(dk_ptr + out_offsets, round_to(dk * scale, dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + out_offsets, round_to(dv, dv_ptr.dtype.element_ty), mask=stored)


@triton.jit
def next_in_split(tile, split, num_splits):
    """The first tile of this split from `tile` on."""
    return tile + (split - tile % num_splits + num_splits) % num_splits


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    offset: int,
    lengths: Tensor | None,
    left_padding: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch both kernels; do (B, T, H, D) is the gradient of `forward`'s out, the rest as there.

    Returns:
        dq (B, T, H, D), dk and dv (B, S, G, D), contiguous, in q's dtype.
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if do.stride(3) != 1:
        do = do.contiguous()
    heads = H // G
    padded = triton.next_power_of_2(max(D, 16))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    delta = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    dropout = seed is not None
    query = query_tiles(q.dtype, D, dropout)
    key = key_tiles(q.dtype, D, dropout, launch.architecture(q.device))
    blocks = triton.cdiv(S, key.N)
    if blocks > launch.MAX_GRID:
        raise ValueError(f"S is {S}: the backward kernels take at most {launch.MAX_GRID * key.N}")
    row_tiles = triton.cdiv(T * heads, key.M)
    num_splits = row_splits(blocks * B * G, row_tiles, key, multiprocessors(q.device))
    # Several splits are summed in float32, in a fixed order.
    dtype = q.dtype if num_splits == 1 else torch.float32
    dk = torch.empty((num_splits, B, S, G, D), dtype=dtype, device=q.device)
    dv = torch.empty_like(dk)
    with torch.cuda.device_of(q):
        dq_kernel[(triton.cdiv(T * heads, query.M), B * G)](
            q, k, v, out, do, lse, delta, dq, start, lengths,
            left_padding, seed, offset, T, S, scale, scale * LOG2E.value, dropout_p, *strides,
            G=G, HEADS=heads, D=D, M=query.M, N=query.N, PADDED_D=padded, DROPOUT=dropout,
            num_warps=query.warps, num_stages=query.stages,
        )  # fmt: skip
        dkv_kernel[(num_splits, B * G, blocks)](
            q, k, v, do, lse, delta, dk, dv, start, lengths,
            left_padding, seed, offset, B, T, S, scale, scale * LOG2E.value, dropout_p, *strides,
            G=G, HEADS=heads, D=D, M=key.M, N=key.N, PADDED_D=padded, DROPOUT=dropout,
            num_warps=key.warps, num_stages=key.stages,
        )  # fmt: skip
    if num_splits == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)
