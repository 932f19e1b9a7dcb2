"""The kernels of decoding with few rows: layer norm, product with a weight, and what follows.

R = B * T rows, at most 16 (or 64 before an 8-bit layer by itself), meet a weight (N, K) that is
read once, so all that counts is that memory never rests. A program owns BLOCK_N outputs of every
row: nothing has to be joined across programs. It normalises x for itself, which the caches hold by
then, and walks over the columns of its weights with the next loads always under way.

The product runs on tensor cores as weights (BLOCK_N, BLOCK_K) times x (BLOCK_K, ROWS), as the side
that must be large is the weights'; the few rows are padded to 1, or to a power of two from 8 on. A
tile of weights with few outputs would leave most warps without work, so it has SHARES parts, side
by side along K. Each warp multiplies its own; their sums are added at the end, in a fixed order.

From sm_90 on, a kernel may start while its predecessor still runs (programmatic dependent launch).
It then loads its first tile of weights, and waits before it touches what other kernels write.

Weights may be int8, with a scale for each row. They become x's dtype just before the product, which
is exact, and the scale multiplies the row's sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mqa_kernels.tiles import await_inputs, dot, let_next_start, narrow


@triton.jit
def columns(first, SHARES: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of one step along K, (SHARES, BLOCK_K)."""
    return first + tl.arange(0, SHARES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def load_weight(weight_ptr, n, k, N, K: tl.constexpr):
    """Rows n of the weight at columns k, (SHARES, BLOCK_N, BLOCK_K); zeros beyond its edges."""
    return tl.load(
        weight_ptr + n.to(tl.int64)[None, :, None] * K + k[:, None, :],
        mask=(n < N)[None, :, None] & (k < K)[:, None, :],
        other=0,
        eviction_policy="evict_first",  # each weight is read once; x is read by every program
    )


@triton.jit
def load_vector(vector_ptr, at, size, ABSENT: tl.constexpr = 0.0):
    """Elements `at` of a vector in float32; zeros beyond its end, ABSENT if there is no vector."""
    if vector_ptr is None:
        values = tl.full(at.shape, ABSENT, tl.float32)
    else:
        values = tl.load(vector_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    return values


@triton.jit
def statistics(x_ptr, eps, R, K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and reciprocal standard deviation of each row, (ROWS,) float32.

    One pass over x - origin, where origin is the mean of the row's first CHUNK elements. As that is
    the mean of a part of the row, the variance cannot be much smaller than (mean - origin)^2, and
    subtracting that loses at most a factor K / CHUNK of precision; nothing if the chunk is the row.
    """
    rows, k = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    pointers = x_ptr + rows[:, None] * K + k[None, :]
    real = (rows < R)[:, None]
    x = tl.load(pointers, mask=real & (k < K)[None, :], other=0.0).to(tl.float32)
    origin = tl.sum(x, 1) / min(CHUNK, K)  # (ROWS,)
    x = tl.where((k < K)[None, :], x - origin[:, None], 0.0)
    total, squares = x, x * x  # (ROWS, CHUNK)
    for first in tl.static_range(CHUNK, K, CHUNK):
        inside = (k + first < K)[None, :]
        x = tl.load(pointers + first, mask=real & inside, other=0.0).to(tl.float32)
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
def add_products(
    acc, weight, gain, offset, mean, rstd, x_ptr, k, R,
    K: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """acc + weight (SHARES, BLOCK_N, BLOCK_K) times the normalised x (SHARES, BLOCK_K, ROWS)."""
    rows = tl.arange(0, ROWS)
    x = tl.load(
        x_ptr + rows[None, :, None] * K + k[:, None, :],
        mask=(rows < R)[None, :, None] & (k < K)[:, None, :],
        other=0.0,
    )  # (SHARES, ROWS, BLOCK_K)
    if NORM:
        x = (x.to(tl.float32) - mean[None, :, None]) * rstd[None, :, None]
        x = narrow(x * gain[:, None, :] + offset[:, None, :], x_ptr.dtype.element_ty)
    if weight.dtype == tl.int8:
        weight = narrow(weight.to(tl.float32), x.dtype)
    return dot(weight, tl.permute(x, (0, 2, 1)), acc)


@triton.jit
def products(
    weight, scale, gain, offset, x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr,
    eps, n, R, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs n of every row, (BLOCK_N, ROWS) float32, given the first step's weights and n's
    scales."""
    NORM: tl.constexpr = norm_weight_ptr is not None
    mean, rstd = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if NORM:
        mean, rstd = statistics(x_ptr, eps, R, K, ROWS, CHUNK)
    acc = tl.zeros([SHARES, BLOCK_N, ROWS], tl.float32)
    k = columns(0, SHARES, BLOCK_K)
    acc = add_products(acc, weight, gain, offset, mean, rstd, x_ptr, k, R, K, ROWS, NORM)
    for first in tl.range(SHARES * BLOCK_K, K, SHARES * BLOCK_K, num_stages=STAGES):
        k = columns(first, SHARES, BLOCK_K)
        weight = load_weight(weight_ptr, n, k, N, K)
        gain, offset = load_vector(norm_weight_ptr, k, K), load_vector(norm_bias_ptr, k, K)
        acc = add_products(acc, weight, gain, offset, mean, rstd, x_ptr, k, R, K, ROWS, NORM)
    return tl.sum(acc, 0) * scale[:, None]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """relu, gelu (exact, with erf) or gelu_tanh, in float32; or x itself."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # so NaN is passed on
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit(do_not_specialize=["R"])
def linear_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr,
    eps, R, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out (R, N) = activation(norm(x) @ weight.T + bias) + residual; what is None is left out.

    Grid: (cdiv(N, BLOCK_N),).
    """
    let_next_start(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = columns(0, SHARES, BLOCK_K)
    gain, offset = load_vector(norm_weight_ptr, k, K), load_vector(norm_bias_ptr, k, K)
    scale, bias = load_vector(scale_ptr, n, N, 1.0), load_vector(bias_ptr, n, N)  # (BLOCK_N,)
    weight = load_weight(weight_ptr, n, k, N, K)
    await_inputs(OVERLAP)

    rows = tl.arange(0, ROWS)
    at = rows[None, :].to(tl.int64) * N + n[:, None]  # (BLOCK_N, ROWS)
    inside = (rows < R)[None, :] & (n < N)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = products(
        weight, scale, gain, offset, x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr,
        eps, n, R, N, K, ROWS, BLOCK_N, SHARES, BLOCK_K, CHUNK, STAGES,
    )  # fmt: skip
    out = activate(out + bias[:, None], ACTIVATION)
    if residual_ptr is not None:
        out += residual
    tl.store(out_ptr + at, narrow(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "T"])
def qkv_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, bias_ptr,
    slots_ptr, lengths_ptr, q_ptr, eps, R, T, N, max_length, stride_b, stride_s, stride_g,
    K: tl.constexpr, QUERY: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SHARES: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """norm(x) @ weight.T + bias, of which queries go to q (R, H * D) and the rest to the cache.

    The outputs are, for each key/value head, QUERY = H / G * D channels of queries, then K, then V.
    Grid: (cdiv(N, BLOCK_N),).
    """
    let_next_start(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = columns(0, SHARES, BLOCK_K)
    gain, offset = load_vector(norm_weight_ptr, k, K), load_vector(norm_bias_ptr, k, K)
    scale, bias = load_vector(scale_ptr, n, N, 1.0), load_vector(bias_ptr, n, N)  # (BLOCK_N,)
    weight = load_weight(weight_ptr, n, k, N, K)
    await_inputs(OVERLAP)

    rows = tl.arange(0, ROWS)
    b = rows // T
    positions = tl.load(lengths_ptr + b, mask=rows < R, other=-1) + rows % T  # (ROWS,) int64
    out = products(
        weight, scale, gain, offset, x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr,
        eps, n, R, N, K, ROWS, BLOCK_N, SHARES, BLOCK_K, CHUNK, STAGES,
    )  # fmt: skip
    out = narrow(out + bias[:, None], q_ptr.dtype.element_ty)  # (BLOCK_N, ROWS)

    g, channel = n // (QUERY + 2 * D), n % (QUERY + 2 * D)
    inside = (rows < R)[None, :] & (n < N)[:, None]
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
