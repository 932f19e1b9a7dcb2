"""Greedy decoding's last step: which logit is the largest, without writing any logit.

Each program of `argmax_kernel` computes BLOCK_N logits of every row as `fused.linear_kernel` does,
and keeps the best of each row; `choose_kernel` compares those. Value and index travel as one
integer (`rank`), so that a plain maximum decides ties and NaN too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mqa_kernels.fused import columns, load_vector, load_weight, products
from mqa_kernels.tiles import await_inputs, let_next_start, narrow


@triton.jit
def rank(x, index):
    """One int64 that orders by value, NaN above all, and then by lower index.

    The bits of a float32 order like integers, once those below the sign are flipped in negative
    numbers; both zeros become one.
    """
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def value_and_index(ranked):
    """The inverse of `rank`."""
    key = (ranked >> 32).to(tl.int32)
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (ranked & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["R"])
def argmax_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, best_ptr, eps, R, N,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The best of each row's BLOCK_N logits, ranked: best (R, programs) int64.

    Logits are rounded to the model's dtype first: what is a tie there must be one here.
    Grid: (cdiv(N, BLOCK_N),).
    """
    let_next_start(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = columns(0, SHARES, BLOCK_K)
    gain, offset = load_vector(norm_weight_ptr, k, K), load_vector(norm_bias_ptr, k, K)
    scale = load_vector(scale_ptr, n, N, 1.0)  # (BLOCK_N,)
    weight = load_weight(weight_ptr, n, k, N, K)
    await_inputs(OVERLAP)

    logits = products(
        weight, scale, gain, offset, x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr,
        eps, n, R, N, K, ROWS, BLOCK_N, SHARES, BLOCK_K, CHUNK, STAGES,
    )  # fmt: skip
    logits = narrow(logits, x_ptr.dtype.element_ty).to(tl.float32)  # (BLOCK_N, ROWS)
    lowest = tl.full([1], -(2**63), tl.int64)
    ranked = tl.where((n < N)[:, None], rank(logits, n[:, None]), lowest)
    rows = tl.arange(0, ROWS)
    at = rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_ptr + at, tl.max(ranked, 0), mask=rows < R)


@triton.jit
def choose_kernel(best_ptr, ids_ptr, values_ptr, parts, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """The best of each row's parts: its index and its value. Grid: (R,)."""
    let_next_start(OVERLAP)
    await_inputs(OVERLAP)
    row, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -(2**63), tl.int64)
    for first in range(0, parts, BLOCK):
        at = first + lanes
        ranked = tl.load(best_ptr + row * parts + at, mask=at < parts, other=-(2**63))
        best = tl.maximum(best, ranked)
    value, index = value_and_index(tl.max(best, 0))
    tl.store(ids_ptr + row, index)
    tl.store(values_ptr + row, value)
