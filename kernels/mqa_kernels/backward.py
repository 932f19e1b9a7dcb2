"""The backward kernels: dQ by row tiles, dK and dV by key blocks. Dimensions as in `forward.py`.

With P the probabilities, O their product with V and dO the gradient of the output:

    dV = P^T dO        dP = dO V^T        delta = rowsum(dO * O)
    dS = P * (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

P is computed again from Q, K and the saved log-sum-exp. The heads of a group are rows like any
others, so their share of dK and dV is summed inside the matrix product: nothing of size (B, T, H,
D) is written for it, nothing is added atomically, and the result is the same at every run.
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
    count_of_new,
    count_of_padding,
    dot,
    dropout_keeps,
    first_position,
    group_offset,
    load_rows,
    load_seed,
    narrow,
    row_offsets,
)
from mqa_kernels.tuning import key_tiles, query_tiles, split_count


@triton.jit
def _dq_step(
    dq, q, do, lse_log2, delta, block, k_ptr, v_ptr, stride_ks, stride_vs, channels, end,
    rows, row_positions, scale_log2, seed, dropout_p, b, g,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add what one block of keys contributes to the tile's dQ / scale."""
    keys = block * N + tl.arange(0, N)
    at = keys.to(tl.int64)[:, None]
    k_pointers = k_ptr + at * stride_ks + channels[None, :]
    v_pointers = v_ptr + at * stride_vs + channels[None, :]
    k = load_rows(k_pointers, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    v = load_rows(v_pointers, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    zeros = tl.zeros([q.shape[0], N], tl.float32)
    # A row that is not real has lse infinity, and so probability 0 everywhere.
    p = tl.exp2(dot(q, tl.trans(k), zeros) * scale_log2 - lse_log2[:, None])  # (M, N)
    if MASKED:
        p = tl.where(keys[None, :] <= row_positions[:, None], p, 0.0)
    dp = dot(do, tl.trans(v), zeros)  # (M, N)
    if DROPOUT:
        keep = dropout_keeps(seed, b, g, rows[:, None], keys[None, :], dropout_p, G, R)
        dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
    ds = p * (dp - delta[:, None])  # (M, N)
    return dot(narrow(ds, k.dtype), k, dq)  # (M, D)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, lengths_ptr,
    left_ptr, seed_ptr, offset, T, S, scale, scale_log2, dropout_p,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_ob, stride_ot, stride_oh,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of M folded rows, and its delta, which the other kernel reads.

    Grid: (row tiles, B * G). out, lse, delta and dq are contiguous; dO has strides of its own.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    # Slots and positions count from the end of the padding.
    left = count_of_padding(left_ptr, b)
    size = S - left
    start = first_position(start_ptr, offset, b) - left
    new = count_of_new(lengths_ptr, T, b)
    seed = load_seed(seed_ptr)
    H = G * R

    rows = tile * M + tl.arange(0, M)  # (M,)
    t = rows // R
    real = t < new
    channels = tl.arange(0, PADDED_D)
    q_base = q_ptr + group_offset(b, g * R, stride_qb, stride_qh)
    do_base = do_ptr + group_offset(b, g * R, stride_ob, stride_oh)
    q_at = row_offsets(rows, channels, stride_qt, stride_qh, R)
    do_at = row_offsets(rows, channels, stride_ot, stride_oh, R)
    q = load_rows(q_base + q_at, real, channels, D, PADDED_D, True)  # (M, D)
    do = load_rows(do_base + do_at, real, channels, D, PADDED_D, True)  # (M, D)

    row_at = b.to(tl.int64) * T * H + g * R + t.to(tl.int64) * H + rows % R  # of (B, T, H)
    out_at = row_at[:, None] * D + channels[None, :]
    out = load_rows(out_ptr + out_at, real, channels, D, PADDED_D, True)  # (M, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # (M,)
    stored = rows < T * R
    tl.store(delta_ptr + row_at, delta, mask=stored)
    lse_log2 = tl.load(lse_ptr + row_at, mask=real, other=float("inf")) * LOG2E  # (M,)

    first_t = tile * M // R
    last_t = tl.minimum((tile * M + M - 1) // R, new - 1)
    end = tl.where(first_t < new, tl.maximum(tl.minimum(start + last_t + 1, size), 0), 0)
    seen_by_all = tl.maximum(tl.minimum(start + first_t + 1, end), 0)
    k_base = (
        k_ptr
        + b.to(tl.int64) * stride_kb
        + g.to(tl.int64) * stride_kg
        + left.to(tl.int64) * stride_ks
    )
    v_base = (
        v_ptr
        + b.to(tl.int64) * stride_vb
        + g.to(tl.int64) * stride_vg
        + left.to(tl.int64) * stride_vs
    )
    positions = tl.minimum(start + t, size - 1)  # (M,)
    dq = tl.zeros([M, PADDED_D], tl.float32)
    for block in range(0, seen_by_all // N):
        dq = _dq_step(
            dq, q, do, lse_log2, delta, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, R, D, N, PADDED_D, False, DROPOUT,
        )  # fmt: skip
    for block in range(seen_by_all // N, tl.cdiv(end, N)):
        dq = _dq_step(
            dq, q, do, lse_log2, delta, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, R, D, N, PADDED_D, True, DROPOUT,
        )  # fmt: skip
    tl.store(
        dq_ptr + out_at,
        narrow(dq * scale, dq_ptr.dtype.element_ty),
        mask=stored[:, None] & (channels[None, :] < D),
    )


@triton.jit
def _dkv_step(
    dk, dv, k, v, tile, q_ptr, do_ptr, lse_ptr, delta_ptr, row_base,
    stride_qt, stride_qh, stride_ot, stride_oh, channels,
    keys, start, new, left, scale_log2, seed, dropout_p, b, g,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, M: tl.constexpr, PADDED_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add what one tile of rows contributes to the block's dK / scale and dV.

    Scores and what is made of them lie with the keys as rows, which is how the last two products
    need them: on sm_90 they go from one product to the next in registers.
    """
    rows = tile * M + tl.arange(0, M)  # (M,)
    t = rows // R
    real = t < new
    q_at = row_offsets(rows, channels, stride_qt, stride_qh, R)
    do_at = row_offsets(rows, channels, stride_ot, stride_oh, R)
    q = load_rows(q_ptr + q_at, real, channels, D, PADDED_D, True)  # (M, D)
    do = load_rows(do_ptr + do_at, real, channels, D, PADDED_D, True)  # (M, D)
    row_at = row_base + t.to(tl.int64) * (G * R) + rows % R
    lse_log2 = tl.load(lse_ptr + row_at, mask=real, other=float("inf")) * LOG2E  # (M,)
    zeros = tl.zeros([keys.shape[0], M], tl.float32)
    # A row that is not real has lse infinity, and so probability 0 everywhere.
    p = tl.exp2(dot(k, tl.trans(q), zeros) * scale_log2 - lse_log2[None, :])  # (N, M)
    if MASKED:
        p = tl.where(keys[:, None] <= (start + t)[None, :], p, 0.0)
    dp = dot(v, tl.trans(do), zeros)  # (N, M)
    p_kept = p
    if DROPOUT:
        keep = dropout_keeps(seed, b, g, rows[None, :], (keys - left)[:, None], dropout_p, G, R)
        p_kept = tl.where(keep, p / (1 - dropout_p), 0.0)
        dp = tl.where(keep, dp / (1 - dropout_p), 0.0)
    dv = dot(narrow(p_kept, do.dtype), do, dv)  # (N, D)
    # Read only now, because a thread needs as many registers for it as for a row of scores.
    delta = tl.load(delta_ptr + row_at, mask=real, other=0.0)  # (M,)
    ds = p * (dp - delta[None, :])  # (N, M)
    dk = dot(narrow(ds, q.dtype), q, dk)  # (N, D)
    return dk, dv


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, start_ptr, lengths_ptr,
    left_ptr, seed_ptr, offset, B, T, S, scale, scale_log2, dropout_p,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    stride_ob, stride_ot, stride_oh,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of N keys, from one share of the tiles of rows that see it.

    Grid: (key blocks, B * G, shares); a share is every so many-th tile. Writes dk and dv (shares,
    B, S, G, D).
    """
    block = tl.program_id(0)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    split, shares = tl.program_id(2), tl.num_programs(2)
    start = first_position(start_ptr, offset, b)
    left = count_of_padding(left_ptr, b)
    new = count_of_new(lengths_ptr, T, b)
    seed = load_seed(seed_ptr)

    keys = block * N + tl.arange(0, N)  # (N,)
    seen = (keys >= left) & (keys < tl.minimum(start + new, S))
    channels = tl.arange(0, PADDED_D)
    at = keys.to(tl.int64)[:, None]
    k_base = k_ptr + group_offset(b, g, stride_kb, stride_kg)
    v_base = v_ptr + group_offset(b, g, stride_vb, stride_vg)
    k_pointers = k_base + at * stride_ks + channels[None, :]
    v_pointers = v_base + at * stride_vs + channels[None, :]
    k = load_rows(k_pointers, seen, channels, D, PADDED_D, True)  # (N, D)
    v = load_rows(v_pointers, seen, channels, D, PADDED_D, True)  # (N, D)

    # Rows see this block from the position of its first key on, all of it from its last key's on.
    first_t = tl.maximum(block * N - start, 0)
    all_t = tl.maximum(block * N + N - 1 - start, 0)
    first = next_share(first_t * R // M, split, shares)
    middle = next_share(tl.cdiv(all_t * R, M), split, shares)
    tiles = tl.cdiv(new * R, M)
    q_base = q_ptr + group_offset(b, g * R, stride_qb, stride_qh)
    do_base = do_ptr + group_offset(b, g * R, stride_ob, stride_oh)
    row_base = b.to(tl.int64) * T * (G * R) + g * R
    dk = tl.zeros([N, PADDED_D], tl.float32)
    dv = tl.zeros([N, PADDED_D], tl.float32)
    for tile in range(first, tl.minimum(middle, tiles), shares):
        dk, dv = _dkv_step(
            dk, dv, k, v, tile, q_base, do_base, lse_ptr, delta_ptr, row_base,
            stride_qt, stride_qh, stride_ot, stride_oh, channels,
            keys, start, new, left, scale_log2, seed, dropout_p, b, g,
            G, R, D, M, PADDED_D, True, DROPOUT,
        )  # fmt: skip
    for tile in range(middle, tiles, shares):
        dk, dv = _dkv_step(
            dk, dv, k, v, tile, q_base, do_base, lse_ptr, delta_ptr, row_base,
            stride_qt, stride_qh, stride_ot, stride_oh, channels,
            keys, start, new, left, scale_log2, seed, dropout_p, b, g,
            G, R, D, M, PADDED_D, False, DROPOUT,
        )  # fmt: skip
    out_rows = (split * B + b).to(tl.int64) * S + keys  # (N,)
    out_at = (out_rows * G + g)[:, None] * D + channels[None, :]
    stored = (keys < S)[:, None] & (channels[None, :] < D)
    # Padding is not masked in the loops: what it has got here may be infinite.
    dk = tl.where(seen[:, None], dk, 0.0)
    dv = tl.where(seen[:, None], dv, 0.0)
    tl.store(dk_ptr + out_at, narrow(dk * scale, dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + out_at, narrow(dv, dv_ptr.dtype.element_ty), mask=stored)


@triton.jit
def next_share(x, split, shares):
    """The smallest number from x on that is `split` modulo `shares`."""
    return x + (split - x % shares + shares) % shares


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
    R = H // G
    padded = triton.next_power_of_2(max(D, 16))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    delta = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    dropout = seed is not None
    query = query_tiles(q.dtype, D, dropout)
    key = key_tiles(q.dtype, D, dropout, launch.architecture(q.device))
    blocks = triton.cdiv(S, key.N)
    shares = split_count(blocks * B * G, T * R, key.M, multiprocessors(q.device))
    # Shares are summed in float32, in a fixed order.
    dtype = q.dtype if shares == 1 else torch.float32
    dk = torch.empty((shares, B, S, G, D), dtype=dtype, device=q.device)
    dv = torch.empty_like(dk)
    with torch.cuda.device_of(q):
        dq_kernel[(triton.cdiv(T * R, query.M), B * G)](
            q, k, v, out, do, lse, delta, dq, start, lengths,
            left_padding, seed, offset, T, S, scale, scale * LOG2E.value, dropout_p, *strides,
            G=G, R=R, D=D, M=query.M, N=query.N, PADDED_D=padded, DROPOUT=dropout,
            num_warps=query.warps, num_stages=query.stages,
        )  # fmt: skip
        dkv_kernel[(blocks, B * G, shares)](
            q, k, v, do, lse, delta, dk, dv, start, lengths,
            left_padding, seed, offset, B, T, S, scale, scale * LOG2E.value, dropout_p, *strides,
            G=G, R=R, D=D, M=key.M, N=key.N, PADDED_D=padded, DROPOUT=dropout,
            num_warps=key.warps, num_stages=key.stages,
        )  # fmt: skip
    return dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)
