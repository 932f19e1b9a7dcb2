"""Greedy decoding's last step: the argmax over the vocabulary, without writing the logits.

Each program of `argmax_kernel` computes BLOCK_N logits of every row, as `fused.linear_kernel` does,
and keeps each row's largest; `choose_kernel` reduces those to one. Logit and index are packed into
one integer (`pack`), so that a plain maximum decides ties and NaN too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mqa_kernels.fused import load_vector, matmul, prefetch_norm, prefetch_weight
from mqa_kernels.tiles import await_inputs, launch_dependents, round_to


@triton.jit
def pack(x, index):
    """One int64 ordered by value, with NaN the largest, and then by lower index.

    The bits of float32 numbers sort like integers once the bits below the sign are flipped in
    negative numbers. -0 becomes 0.
    """
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def unpack(packed):
    """The value and the index, inverse of `pack`."""
    key = (packed >> 32).to(tl.int32)
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["num_rows"])
def argmax_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, best_ptr, eps, num_rows, N,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The largest of BLOCK_N logits of each row.

    Grid: (programs,), with programs = cdiv(N, BLOCK_N). Reads x (num_rows, K), weight (N, K), scale
    (N,), the norm's weight and bias (K,); writes best (num_rows, programs), packed int64. Logits
    are rounded to the model's dtype first, because what is a tie there must be one here.
    """
    launch_dependents(OVERLAP)
    prefetch_norm(norm_weight_ptr, norm_bias_ptr, K, PREFETCH)
    prefetch_weight(weight_ptr, N, K, BLOCK_N, PREFETCH)
    await_inputs(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = load_vector(scale_ptr, n, N, 1.0)  # (BLOCK_N,)
    logits = matmul(
        x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale,
        eps, n, num_rows, N, K, ROWS, BLOCK_N, SPLIT_K, BLOCK_K, CHUNK, STAGES,
    )  # fmt: skip
    # ptxas would convert the sums to float16 before the wait for their products, and so make these
    # wait for each other. It does not move an addition.
    logits = round_to(logits + 0.0, x_ptr.dtype.element_ty).to(tl.float32)  # (BLOCK_N, ROWS)
    lowest = tl.full([1], -(2**63), tl.int64)
    packed = tl.where((n < N)[:, None], pack(logits, n[:, None]), lowest)
    rows = tl.arange(0, ROWS)
    offsets = rows * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_ptr + offsets, tl.max(packed, 0), mask=rows < num_rows)


@triton.jit
def choose_kernel(best_ptr, ids_ptr, values_ptr, parts, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Reduce each row's candidates to the index and value of the largest.

    Grid: (num_rows,). Reads best (num_rows, parts); writes ids (num_rows,) int64 and values
    (num_rows,) float32.
    """
    launch_dependents(OVERLAP)
    await_inputs(OVERLAP)
    row, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -(2**63), tl.int64)
    for first in range(0, parts, BLOCK):
        part = first + lanes
        packed = tl.load(best_ptr + row * parts + part, mask=part < parts, other=-(2**63))
        best = tl.maximum(best, packed)
    value, index = unpack(tl.max(best, 0))
    tl.store(ids_ptr + row, index)
    tl.store(values_ptr + row, value)
