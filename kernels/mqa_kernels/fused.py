"""Kernels for decoding a few rows: layer norm, matrix product, bias, activation, residual.

num_rows = B * T rows of x, at most 64, times a weight (N, K), as `nn.Linear` holds it. Every weight
is read once, so the time is that of reading them, if memory never idles. A program computes BLOCK_N
outputs of every row, so nothing has to be combined across programs, and loops over the columns of
its weights, with the next loads always in flight. The weights are the large operand on tensor
cores, and the few rows are padded to ROWS, 1 or a power of two from 8 on.

Up to 16 rows (`few_rows`) a program normalizes x itself; x is in the L2 cache. With BLOCK_N = 16 a
tile would leave most warps idle, so a step along K has SPLIT_K parts of BLOCK_K columns, one or
more warps multiply each, and their sums are added at the end in a fixed order (split-K, as in
CUTLASS, but inside one program).

With more rows (`many_rows`) that would take longer than reading the weights. So a small kernel
normalizes x first, and BLOCK_N is 64 or 128, because each program reads all of x: ROWS / BLOCK_N as
many bytes as weights.

From sm_90 on, a kernel may start while its predecessor still runs (programmatic dependent launch).
It then has the L2 cache fetch its weights, and waits before it reads or writes anything.

Weights may be int8 with one scale per row (output). They are converted to x's dtype right before
the product, which is exact, and the scale multiplies the row's float32 sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mqa_kernels import launch
from mqa_kernels.tiles import await_inputs, dot, launch_dependents, prefetch, round_to

FEW_ROWS: tl.constexpr = tl.constexpr(launch.FEW_ROWS)


@triton.jit
def columns(first, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of one step along K: (SPLIT_K, BLOCK_K)."""
    return first + tl.arange(0, SPLIT_K)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def prefetch_norm(weight_ptr, bias_ptr, K: tl.constexpr, PREFETCH: tl.constexpr):
    """Ask the L2 cache for a layer norm's parameters, if there is one."""
    if weight_ptr is not None:
        prefetch(weight_ptr, 0, K, min(PREFETCH, 16_384))
        prefetch(bias_ptr, 0, K, min(PREFETCH, 16_384))


@triton.jit
def prefetch_weight(weight_ptr, N, K: tl.constexpr, BLOCK_N: tl.constexpr, PREFETCH: tl.constexpr):
    """Ask the L2 cache for PREFETCH bytes of the program's rows, which lie one after the other."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N
    prefetch(weight_ptr, n * K, tl.minimum(n + BLOCK_N, N) * K, PREFETCH)


@triton.jit
def load_weight(weight_ptr, n, k, N, K: tl.constexpr):
    """Rows n of the weight at columns k: (SPLIT_K, BLOCK_N, BLOCK_K); zero outside the weight."""
    return tl.load(
        weight_ptr + n.to(tl.int64)[None, :, None] * K + k[:, None, :],
        mask=(n < N)[None, :, None] & (k < K)[:, None, :],
        other=0,
        eviction_policy="evict_first",  # only of a single step: copies in a loop take no hint
    )


@triton.jit
def load_vector(vector_ptr, index, size, ABSENT: tl.constexpr = 0.0):
    """Elements of a vector in float32: zero beyond its end, ABSENT where there is no vector."""
    if vector_ptr is None:
        values = tl.full(index.shape, ABSENT, tl.float32)
    else:
        values = tl.load(vector_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    return values


@triton.jit
def mean_and_rstd(x_ptr, eps, num_rows, K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and reciprocal standard deviation of each row: (ROWS,) float32 each.

    One pass over x - origin, where origin is the mean of the row's first CHUNK elements. Since that
    is the mean of a part of the row, the variance cannot be much smaller than (mean - origin)^2,
    and subtracting it costs at most a factor K / CHUNK of precision; nothing if CHUNK covers K.
    """
    rows, k = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    pointers = x_ptr + rows[:, None] * K + k[None, :]
    valid = (rows < num_rows)[:, None]
    x = tl.load(pointers, mask=valid & (k < K)[None, :], other=0.0).to(tl.float32)
    origin = tl.sum(x, 1) / min(CHUNK, K)  # (ROWS,)
    x = tl.where((k < K)[None, :], x - origin[:, None], 0.0)
    total, squares = x, x * x  # (ROWS, CHUNK)
    for first in tl.static_range(CHUNK, K, CHUNK):
        inside = (k + first < K)[None, :]
        x = tl.load(pointers + first, mask=valid & inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - origin[:, None], 0.0)
        total += x
        squares += x * x
    mean, variance = origin, tl.sum(squares, 1) / K
    if CHUNK < K:
        shift = tl.sum(total, 1) / K
        mean += shift
        variance -= shift * shift
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def as_float(weight, dtype: tl.constexpr):
    """Weights in `dtype`; int8 is converted, which is exact."""
    return round_to(weight.to(tl.float32), dtype) if weight.dtype == tl.int8 else weight


@triton.jit
def few_rows(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr,
    eps, n, num_rows, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """weight @ layer_norm(x).T, or weight @ x.T, for at most 16 rows: (BLOCK_N, ROWS) float32."""
    rows = tl.arange(0, ROWS)
    if norm_weight_ptr is not None:
        mean, rstd = mean_and_rstd(x_ptr, eps, num_rows, K, ROWS, CHUNK)
    acc = tl.zeros([SPLIT_K, BLOCK_N, ROWS], tl.float32)
    for first in tl.range(0, K, SPLIT_K * BLOCK_K, num_stages=STAGES):
        k = columns(first, SPLIT_K, BLOCK_K)
        weight = load_weight(weight_ptr, n, k, N, K)
        x = tl.load(
            x_ptr + rows[None, :, None] * K + k[:, None, :],
            mask=(rows < num_rows)[None, :, None] & (k < K)[:, None, :],
            other=0.0,
        )  # (SPLIT_K, ROWS, BLOCK_K)
        if norm_weight_ptr is not None:
            gain, offset = load_vector(norm_weight_ptr, k, K), load_vector(norm_bias_ptr, k, K)
            x = (x.to(tl.float32) - mean[None, :, None]) * rstd[None, :, None]
            x = round_to(x * gain[:, None, :] + offset[:, None, :], x_ptr.dtype.element_ty)
        acc = dot(as_float(weight, x.dtype), tl.permute(x, (0, 2, 1)), acc)
    return tl.sum(acc, 0)


@triton.jit
def many_rows(
    x_ptr, weight_ptr, scale, n, num_rows, N, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """weight @ x.T in two dimensions, for which sm_90 and later have instructions of their own:
    (BLOCK_N, ROWS) float32.

    Converted weights are in registers, which `wgmma` reads while the next instructions run. Triton
    would load the next step's weights into them without waiting for it. It waits for products whose
    result is used in their own step, so the scale of int8 weights is applied in each step.
    """
    rows = tl.arange(0, ROWS)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        weight = tl.load(
            weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :],
            mask=(n < N)[:, None] & (k < K)[None, :],
            other=0,
        )  # (BLOCK_N, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * K + k[None, :],
            mask=(rows < num_rows)[:, None] & (k < K)[None, :],
            other=0.0,
        )  # (ROWS, BLOCK_K)
        if weight.dtype == tl.int8:
            zeros = tl.zeros([BLOCK_N, ROWS], tl.float32)
            acc += dot(as_float(weight, x.dtype), tl.trans(x), zeros) * scale[:, None]
        else:
            acc = dot(weight, tl.trans(x), acc)
    return acc


@triton.jit
def matmul(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale,
    eps, n, num_rows, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs n of every row: (BLOCK_N, ROWS) float32. `scale` is that of int8 weights, or ones."""
    if ROWS <= FEW_ROWS:
        out = few_rows(
            x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr,
            eps, n, num_rows, N, K, ROWS, BLOCK_N, SPLIT_K, BLOCK_K, CHUNK, STAGES,
        ) * scale[:, None]  # fmt: skip
    else:
        tl.static_assert(norm_weight_ptr is None, "x must be normalized by norm_kernel")
        out = many_rows(x_ptr, weight_ptr, scale, n, num_rows, N, K, ROWS, BLOCK_N, BLOCK_K, STAGES)
    return out


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """ACTIVATION in float32: relu, gelu (exact, with erf), gelu_tanh or none."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # passes NaN on
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, eps,
    K: tl.constexpr, CHUNK: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = layer_norm(x), before a product of more than 16 rows.

    Grid: (num_rows,). Reads x (num_rows, K), weight and bias (K,); writes out (num_rows, K).
    """
    launch_dependents(OVERLAP)
    prefetch_norm(weight_ptr, bias_ptr, K, PREFETCH)
    await_inputs(OVERLAP)
    row = tl.program_id(0) * K
    mean, rstd = mean_and_rstd(x_ptr + row, eps, 1, K, 1, CHUNK)  # (1,)
    for first in tl.static_range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
        x = (x - mean) * rstd * load_vector(weight_ptr, k, K) + load_vector(bias_ptr, k, K)
        tl.store(out_ptr + row + k, round_to(x, out_ptr.dtype.element_ty), mask=k < K)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr,
    eps, num_rows, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = activation(layer_norm(x) @ weight.T + bias) + residual; what is None is left out.

    Grid: (cdiv(N, BLOCK_N),). Reads x (num_rows, K), weight (N, K), residual (num_rows, N), scale
    and bias (N,), the norm's weight and bias (K,); writes out (num_rows, N).
    """
    launch_dependents(OVERLAP)
    prefetch_norm(norm_weight_ptr, norm_bias_ptr, K, PREFETCH)
    prefetch_weight(weight_ptr, N, K, BLOCK_N, PREFETCH)
    await_inputs(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale, bias = load_vector(scale_ptr, n, N, 1.0), load_vector(bias_ptr, n, N)  # (BLOCK_N,)
    rows = tl.arange(0, ROWS)
    offsets = rows[None, :].to(tl.int64) * N + n[:, None]  # (BLOCK_N, ROWS)
    inside = (rows < num_rows)[None, :] & (n < N)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    out = matmul(
        x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale,
        eps, n, num_rows, N, K, ROWS, BLOCK_N, SPLIT_K, BLOCK_K, CHUNK, STAGES,
    )  # fmt: skip
    out = activate(out + bias[:, None], ACTIVATION)
    if residual_ptr is not None:
        out += residual
    tl.store(out_ptr + offsets, round_to(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "T"])
def qkv_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, bias_ptr,
    slots_ptr, lengths_ptr, q_ptr, eps, num_rows, T, N, max_length, stride_b, stride_s, stride_g,
    K: tl.constexpr, QUERY: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """layer_norm(x) @ weight.T + bias: queries go to q, keys and values to the cache.

    Per key/value head the outputs are QUERY = H / G * D channels of queries, then D of K and D of
    V. Grid: (cdiv(N, BLOCK_N),), with N = C + 2GD. Reads x (B * T, C), weight (N, C) and lengths
    (B,); writes q (B * T, H * D) and slots (B, max_length, G, 2D) at each row's next T positions.
    """
    launch_dependents(OVERLAP)
    prefetch_norm(norm_weight_ptr, norm_bias_ptr, K, PREFETCH)
    prefetch_weight(weight_ptr, N, K, BLOCK_N, PREFETCH)
    await_inputs(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale, bias = load_vector(scale_ptr, n, N, 1.0), load_vector(bias_ptr, n, N)  # (BLOCK_N,)
    rows = tl.arange(0, ROWS)
    b = rows // T
    positions = tl.load(lengths_ptr + b, mask=rows < num_rows, other=-1) + rows % T  # (ROWS,) int64
    out = matmul(
        x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale,
        eps, n, num_rows, N, K, ROWS, BLOCK_N, SPLIT_K, BLOCK_K, CHUNK, STAGES,
    )  # fmt: skip
    out = round_to(out + bias[:, None], q_ptr.dtype.element_ty)  # (BLOCK_N, ROWS)

    g, channel = n // (QUERY + 2 * D), n % (QUERY + 2 * D)
    inside = (rows < num_rows)[None, :] & (n < N)[:, None]
    is_query = (channel < QUERY)[:, None]
    tl.store(
        q_ptr + rows[None, :] * K + (g * QUERY + channel)[:, None], out, mask=inside & is_query
    )
    held = (positions >= 0) & (positions < max_length)
    slots = slots_ptr + b.to(tl.int64) * stride_b + positions * stride_s  # (ROWS,)
    tl.store(
        slots[None, :] + (g.to(tl.int64) * stride_g + channel - QUERY)[:, None],
        out,
        mask=inside & ~is_query & held[None, :],
    )
