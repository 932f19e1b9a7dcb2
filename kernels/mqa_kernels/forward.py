"""The forward kernel: prefill, chunked prefill, training and, with its keys split, decoding.

Dimensions as in `mqa_gpt.model`: B rows of the batch, T new positions, S slots, H query heads, G
key/value heads, D head dim; and R = H / G query heads of a group. A tile holds M of a group's T * R
folded rows, row = t * R + h, and walks over N keys at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqa_kernels import launch
from mqa_kernels.launch import check_inputs, multiprocessors
from mqa_kernels.tiles import (
    LOG2E,
    await_inputs,
    count_of_new,
    count_of_padding,
    dot,
    dropout_keeps,
    first_position,
    group_offset,
    let_next_start,
    load_rows,
    load_seed,
    narrow,
    row_offsets,
)
from mqa_kernels.tuning import combine_warps, forward_tiles, split_count


@triton.jit
def _see(
    acc, total, top, q, block, k_ptr, v_ptr, stride_ks, stride_vs, channels, end,
    rows, row_positions, scale_log2, seed, dropout_p, b, g,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the tile's queries see one more block of N keys."""
    keys = block * N + tl.arange(0, N)  # (N,)
    k_offsets = keys.to(tl.int64)[:, None] * stride_ks + channels[None, :]
    k = load_rows(k_ptr + k_offsets, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], N], tl.float32))  # (M, N)
    if MASKED:
        scores = tl.where(keys[None, :] <= row_positions[:, None], scores, float("-inf"))
    # Scaled after the maximum is found, so that each score is scaled and subtracted from at once.
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)  # (M,)
    origin = new_top
    if MASKED:  # a row that has not seen any key: -inf - -inf would be NaN
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale_log2 - origin[:, None])  # (M, N)
    shrink = tl.exp2(top - origin)  # (M,)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        keep = dropout_keeps(seed, b, g, rows[:, None], keys[None, :], dropout_p, G, R)
        p = tl.where(keep, p, 0.0)
    v_offsets = keys.to(tl.int64)[:, None] * stride_vs + channels[None, :]
    v = load_rows(v_ptr + v_offsets, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    acc = dot(narrow(p, v.dtype), v, acc * shrink[:, None])  # (M, D)
    return acc, total, new_top


@triton.jit(do_not_specialize=["offset", "S"])  # they change at every step of decoding
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, lengths_ptr, left_ptr, seed_ptr,
    offset, B, T, S, scale_log2, dropout_p,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    DROPOUT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of M folded rows against its keys, or against one of several shares of them.

    Grid: (row tiles, B * G, shares). Writes out (shares, B, T, H, D) and lse (shares, B, T, H), the
    natural logarithm of each row's sum of exponentials; -inf and zeros where it saw no key.
    """
    let_next_start(OVERLAP)
    await_inputs(OVERLAP)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: they end together
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    split = tl.program_id(2)
    # Slots and positions count from the end of the padding.
    left = count_of_padding(left_ptr, b)
    size = S - left
    start = first_position(start_ptr, offset, b) - left
    new = count_of_new(lengths_ptr, T, b)
    seed = load_seed(seed_ptr)

    rows = tile * M + tl.arange(0, M)  # (M,)
    t = rows // R
    channels = tl.arange(0, PADDED_D)
    real = t < new
    q_base = q_ptr + group_offset(b, g * R, stride_qb, stride_qh)
    q_offsets = row_offsets(rows, channels, stride_qt, stride_qh, R)
    q = load_rows(q_base + q_offsets, real, channels, D, PADDED_D, True)  # (M, D)

    # Keys 0 to end - 1 are seen by some row, keys below `seen_by_all` by every row. A query that is
    # padding stands before them all.
    first_t = tile * M // R
    last_t = tl.minimum((tile * M + M - 1) // R, new - 1)
    end = tl.where(first_t < new, tl.maximum(tl.minimum(start + last_t + 1, size), 0), 0)
    seen_by_all = tl.maximum(tl.minimum(start + first_t + 1, end), 0)
    share = tl.cdiv(tl.cdiv(end, N), tl.num_programs(2))
    low = split * share
    high = tl.minimum(low + share, tl.cdiv(end, N))
    middle = tl.minimum(tl.maximum(seen_by_all // N, low), high)

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
    positions = tl.minimum(start + t, size - 1)  # (M,); behind the last slot there is no key
    acc = tl.zeros([M, PADDED_D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    for block in range(low, middle):
        acc, total, top = _see(
            acc, total, top, q, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, R, D, N, PADDED_D, False, DROPOUT,
        )  # fmt: skip
    for block in range(middle, high):
        acc, total, top = _see(
            acc, total, top, q, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, R, D, N, PADDED_D, True, DROPOUT,
        )  # fmt: skip

    saw = (total != 0) & real  # so NaN is passed on
    acc = tl.where(saw[:, None], acc / tl.where(saw, total, 1.0)[:, None], 0.0)
    if DROPOUT:
        acc /= 1 - dropout_p
    lse = tl.where(saw, (top + tl.log2(tl.where(saw, total, 1.0))) / LOG2E, float("-inf"))

    H = G * R
    out_base = (split * B + b).to(tl.int64) * T * H + g * R
    out_rows = out_base + (rows // R).to(tl.int64) * H + rows % R
    stored = rows < T * R
    tl.store(lse_ptr + out_rows, lse, mask=stored)
    tl.store(
        out_ptr + out_rows[:, None] * D + channels[None, :],
        narrow(acc, out_ptr.dtype.element_ty),
        mask=stored[:, None] & (channels[None, :] < D),
    )


@triton.jit
def combine_kernel(
    parts_ptr, lses_ptr, out_ptr, lse_ptr, rows, shares,
    D: tl.constexpr, PADDED_D: tl.constexpr, PADDED_SHARES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Join the partial results of one row: a mean weighted by their sums of exponentials.

    Grid: (B * T * H,). parts (shares, rows, D) float32, lses (shares, rows).
    """
    let_next_start(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    splits, channels = tl.arange(0, PADDED_SHARES), tl.arange(0, PADDED_D)
    at = splits.to(tl.int64) * rows + row
    lses = tl.load(lses_ptr + at, mask=splits < shares, other=float("-inf"))  # (shares,)
    top = tl.max(lses, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(lses - origin)  # (shares,); 0 for an empty split
    total = tl.sum(weights, 0)
    parts = tl.load(
        parts_ptr + at[:, None] * D + channels[None, :],
        mask=(splits[:, None] < shares) & (channels[None, :] < D),
        other=0.0,
    )  # (shares, D)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total != 0, total, 1.0)  # (D,)
    tl.store(out_ptr + row * D + channels, narrow(out, out_ptr.dtype.element_ty), mask=channels < D)
    lse = tl.where(total != 0, origin + tl.log(tl.where(total != 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + row, lse)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    offset: int,
    lengths: Tensor | None,
    left_padding: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in `mqa_kernels.attention`.

    Returns:
        out (B, T, H, D) in q's dtype and lse (B, T, H) float32, both contiguous.
    """
    check_inputs(q, k, v, start, lengths, left_padding, scale)
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    dropout = seed is not None
    tiles = forward_tiles(q.dtype, D, T * (H // G), dropout)
    row_tiles = triton.cdiv(T * (H // G), tiles.M)
    shares = split_count(row_tiles * B * G, S, tiles.N, multiprocessors(q.device))
    parts, lses = out, lse
    if shares > 1:
        parts = torch.empty((shares, B, T, H, D), dtype=torch.float32, device=q.device)
        lses = torch.empty((shares, B, T, H), dtype=torch.float32, device=q.device)
    overlap = launch.overlap(q.device)
    with torch.cuda.device_of(q):
        forward_kernel[(row_tiles, B * G, shares)](
            q, k, v, parts, lses, start, lengths, left_padding, seed,
            offset, B, T, S, scale * LOG2E.value, dropout_p,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            G=G, R=H // G, D=D, M=tiles.M, N=tiles.N, PADDED_D=triton.next_power_of_2(max(D, 16)),
            DROPOUT=dropout, num_warps=tiles.warps, num_stages=tiles.stages, **overlap,
        )  # fmt: skip
        if shares > 1:
            combine_kernel[(B * T * H,)](
                parts, lses, out, lse, B * T * H, shares,
                D=D, PADDED_D=triton.next_power_of_2(D),
                PADDED_SHARES=triton.next_power_of_2(shares),
                num_warps=combine_warps(D, shares), **overlap,
            )  # fmt: skip
    return out, lse
