"""The forward kernel: prefill, chunked prefill, training and, with its keys split, decoding.

Dimensions as in `mqa_gpt.model`: B rows of the batch, T new positions, S slots of keys and values,
H query heads, G key/value heads, D head dim. HEADS = H / G query heads share one key/value head.
They are folded into the rows of one matrix: row = t * HEADS + h, with T * HEADS rows per group. A
program computes a tile of M rows, N keys at a time.
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
    dot,
    dropout_keeps,
    first_position,
    group_offset,
    launch_dependents,
    left_padding_of,
    load_rows,
    load_seed,
    new_tokens_of,
    round_to,
    row_offsets,
    slot_pointer,
    visible_keys,
)
from mqa_kernels.tuning import combine_warps, forward_tiles, key_splits


@triton.jit
def _online_softmax_step(
    acc, l_i, m_i, q, block, k_ptr, v_ptr, stride_ks, stride_vs, channels, end,
    rows, positions, scale_log2, seed, dropout_p, b, g,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Update each row's running output, sum l and maximum m (base 2) with one block of N keys.

    acc (M, D), l_i (M,), m_i (M,); Dao et al. 2022, algorithm 1.
    """
    keys = block * N + tl.arange(0, N)  # (N,)
    k_offsets = keys.to(tl.int64)[:, None] * stride_ks + channels[None, :]
    k = load_rows(k_ptr + k_offsets, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], N], tl.float32))  # (M, N)
    if MASKED:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    # Scaling after the maximum makes scale and subtraction one fused multiply-add per score.
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)  # (M,)
    m_finite = m_new
    if MASKED:  # a row without any key so far: -inf - -inf would be NaN
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores * scale_log2 - m_finite[:, None])  # (M, N)
    alpha = tl.exp2(m_i - m_finite)  # (M,)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT:
        keep = dropout_keeps(seed, b, g, rows[:, None], keys[None, :], dropout_p, G, HEADS)
        p = tl.where(keep, p, 0.0)
    v_offsets = keys.to(tl.int64)[:, None] * stride_vs + channels[None, :]
    v = load_rows(v_ptr + v_offsets, keys < end, channels, D, PADDED_D, MASKED)  # (N, D)
    acc = dot(round_to(p, v.dtype), v, acc * alpha[:, None])  # (M, D)
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["offset", "S"])  # they change at every decode step
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, lengths_ptr, left_ptr, seed_ptr,
    offset, B, T, S, scale_log2, dropout_p,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PADDED_D: tl.constexpr,
    DROPOUT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of M folded rows over all of its keys, or over one split of them.

    Grid: (row tiles, B * G, num_splits). Reads

        q (B, T, H, D), k and v (B, S, G, D)
        start (B,)    added to offset: the slot of each row's first new token; None: offset alone
        lengths (B,)  valid new tokens of each row, at most T; None: T
        left (B,)     each row's first slots that are padding; None: 0
        seed (1,)     int64, of dropout; None: no dropout

    and writes out (num_splits, B, T, H, D) and lse (num_splits, B, T, H), the natural log-sum-exp
    of each row's scores. A row that sees no key gets zeros and -inf.

    Source: FlashAttention-2 (Dao 2023); with several splits Flash-Decoding (Dao et al. 2023).
    """
    launch_dependents(OVERLAP)
    await_inputs(OVERLAP)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    split = tl.program_id(2)
    # Slots and positions count from the end of the padding.
    left = left_padding_of(left_ptr, b)
    size = S - left
    start = first_position(start_ptr, offset, b) - left
    new = new_tokens_of(lengths_ptr, T, b)
    seed = load_seed(seed_ptr)

    rows = tile * M + tl.arange(0, M)  # (M,)
    t = rows // HEADS
    channels = tl.arange(0, PADDED_D)
    valid = t < new
    q_base = q_ptr + group_offset(b, g * HEADS, stride_qb, stride_qh)
    q_offsets = row_offsets(rows, channels, stride_qt, stride_qh, HEADS)
    q = load_rows(q_base + q_offsets, valid, channels, D, PADDED_D, True)  # (M, D)

    # This split's blocks of keys: without a mask from `first` on, with one from `masked` on.
    seen_by_all, end = visible_keys(tile, start, new, size, M, HEADS)
    blocks_per_split = tl.cdiv(tl.cdiv(end, N), tl.num_programs(2))
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(end, N))
    masked = tl.minimum(tl.maximum(seen_by_all // N, first), last)

    k_base = slot_pointer(k_ptr, b, left, g, stride_kb, stride_ks, stride_kg)
    v_base = slot_pointer(v_ptr, b, left, g, stride_vb, stride_vs, stride_vg)
    positions = tl.minimum(start + t, size - 1)  # (M,); there are no keys after the last slot
    acc = tl.zeros([M, PADDED_D], tl.float32)
    l_i = tl.zeros([M], tl.float32)
    m_i = tl.full([M], float("-inf"), tl.float32)
    for block in range(first, masked):
        acc, l_i, m_i = _online_softmax_step(
            acc, l_i, m_i, q, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, HEADS, D, N, PADDED_D, False, DROPOUT,
        )  # fmt: skip
    for block in range(masked, last):
        acc, l_i, m_i = _online_softmax_step(
            acc, l_i, m_i, q, block, k_base, v_base, stride_ks, stride_vs, channels, end,
            rows, positions, scale_log2, seed, dropout_p, b, g,
            G, HEADS, D, N, PADDED_D, True, DROPOUT,
        )  # fmt: skip

    has_keys = (l_i != 0) & valid  # true for NaN, which is passed on
    l_safe = tl.where(has_keys, l_i, 1.0)
    acc = tl.where(has_keys[:, None], acc / l_safe[:, None], 0.0)
    if DROPOUT:
        acc /= 1 - dropout_p
    lse = tl.where(has_keys, (m_i + tl.log2(l_safe)) / LOG2E, float("-inf"))

    H = G * HEADS
    out_base = (split * B + b).to(tl.int64) * T * H + g * HEADS
    out_rows = out_base + (rows // HEADS).to(tl.int64) * H + rows % HEADS
    stored = rows < T * HEADS
    tl.store(lse_ptr + out_rows, lse, mask=stored)
    tl.store(
        out_ptr + out_rows[:, None] * D + channels[None, :],
        round_to(acc, out_ptr.dtype.element_ty),
        mask=stored[:, None] & (channels[None, :] < D),
    )


@triton.jit
def combine_kernel(
    parts_ptr, lses_ptr, out_ptr, lse_ptr, rows, num_splits,
    D: tl.constexpr, PADDED_D: tl.constexpr, PADDED_SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Combine one row's partial results: their mean, weighted by exp(lse).

    Grid: (rows,), with rows = B * T * H. Reads parts (num_splits, rows, D) float32 and lses
    (num_splits, rows); writes out (rows, D) and lse (rows,). Source: Flash-Decoding.
    """
    launch_dependents(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    splits, channels = tl.arange(0, PADDED_SPLITS), tl.arange(0, PADDED_D)
    offsets = splits.to(tl.int64) * rows + row
    lses = tl.load(lses_ptr + offsets, mask=splits < num_splits, other=float("-inf"))  # (splits,)
    m = tl.max(lses, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    weights = tl.exp(lses - m)  # (splits,); 0 for an empty split
    l_sum = tl.sum(weights, 0)
    parts = tl.load(
        parts_ptr + offsets[:, None] * D + channels[None, :],
        mask=(splits[:, None] < num_splits) & (channels[None, :] < D),
        other=0.0,
    )  # (splits, D)
    out = tl.sum(parts * weights[:, None], 0)  # (D,)
    l_safe = tl.where(l_sum != 0, l_sum, 1.0)
    out /= l_safe
    tl.store(
        out_ptr + row * D + channels, round_to(out, out_ptr.dtype.element_ty), mask=channels < D
    )
    tl.store(lse_ptr + row, tl.where(l_sum != 0, m + tl.log(l_safe), float("-inf")))


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
    """Launch the kernels; arguments as in `mqa_kernels.attention`.

    Returns:
        out (B, T, H, D) in q's dtype and lse (B, T, H) float32, both contiguous.
    """
    check_inputs(q, k, v, start, lengths, left_padding, seed, scale)
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    dropout = seed is not None
    assert dropout or dropout_p == 0
    tiles = forward_tiles(q.dtype, D, T * (H // G), dropout, launch.architecture(q.device))
    row_tiles = triton.cdiv(T * (H // G), tiles.M)
    blocks = triton.cdiv(S, tiles.N)
    num_splits = key_splits(row_tiles * B * G, blocks, tiles, multiprocessors(q.device))
    parts, lses = out, lse
    if num_splits > 1:
        parts = torch.empty((num_splits, B, T, H, D), dtype=torch.float32, device=q.device)
        lses = torch.empty((num_splits, B, T, H), dtype=torch.float32, device=q.device)
    options = launch.overlap(q.device)
    with torch.cuda.device_of(q):
        forward_kernel[(row_tiles, B * G, num_splits)](
            q, k, v, parts, lses, start, lengths, left_padding, seed,
            offset, B, T, S, scale * LOG2E.value, dropout_p,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            G=G, HEADS=H // G, D=D, M=tiles.M, N=tiles.N,
            PADDED_D=triton.next_power_of_2(max(D, 16)),
            DROPOUT=dropout, num_warps=tiles.warps, num_stages=tiles.stages, **options,
        )  # fmt: skip
        if num_splits > 1:
            combine_kernel[(B * T * H,)](
                parts, lses, out, lse, B * T * H, num_splits,
                D=D, PADDED_D=triton.next_power_of_2(D),
                PADDED_SPLITS=triton.next_power_of_2(num_splits),
                num_warps=combine_warps(D, num_splits), **options,
            )  # fmt: skip
    return out, lse
