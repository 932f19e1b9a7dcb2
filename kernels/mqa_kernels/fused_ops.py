"""The fused functions for a few rows: argument checks, launches, registration with PyTorch.

A row is one token of one row of the batch, so there are B * T of them, `rows` below.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mqa_kernels import launch
from mqa_kernels.argmax import argmax_kernel, choose_kernel
from mqa_kernels.fused import linear_kernel, norm_kernel, qkv_kernel
from mqa_kernels.launch import FEW_ROWS, check_all, check_rows, multiprocessors, prefetch_bytes
from mqa_kernels.tuning import choose_block, linear_tiles

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    weight_scale: Tensor | None = None,
) -> Tensor:
    """activation(layer_norm(x) @ weight.T + bias) in one launch; in two for more than 16 rows.

    Statistics and sums are float32; the normalized row is rounded to x's dtype. This and the
    functions below are for inference and have no gradient.

    Args:
        x: (rows, C) contiguous, 1 to 64 rows in bfloat16 or float16, 1 to 16 in float32.
        norm_weight, norm_bias: (C,).
        eps: added to the variance.
        weight: (N, C) contiguous, as in `nn.Linear`.
        bias: (N,) or None.
        activation: "none", "relu", "gelu" (exact) or "gelu_tanh".
        weight_scale: (N,) float32, the scale of each row of an int8 weight; None for a weight in
            x's dtype. x itself is never quantized.

    Returns:
        (rows, N) in x's dtype.

    Raises:
        ValueError: the activation is unknown; shapes, dtypes, devices or strides do not match; an
            argument requires a gradient; or there is neither a GPU nor Triton's interpreter.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}: it must be one of {', '.join(ACTIVATIONS)}"
        )
    C, N = check_rows(x, weight, weight_scale)
    check_all(x, {"norm_weight": (norm_weight, (C,)), "norm_bias": (norm_bias, (C,))})
    check_all(x, {"bias": (bias, (N,))})
    return _linear(x, weight, weight_scale, bias, None, norm_weight, norm_bias, eps, activation)


def norm_lm_head(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Logits layer_norm(x) @ weight.T: (rows, V), for the vocabulary's weight (V, C)."""
    return norm_linear(x, norm_weight, norm_bias, eps, weight, weight_scale=weight_scale)


def norm_argmax(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The argmax of each row of `norm_lm_head`, without writing the logits.

    Returns:
        ids (rows,) int64, the lowest in a tie, and their logits (rows,) float32. NaN counts as the
        largest, so that the logit returned is not finite if any logit is NaN or +inf.
    """
    C, _ = check_rows(x, weight, weight_scale)
    check_all(x, {"norm_weight": (norm_weight, (C,)), "norm_bias": (norm_bias, (C,))})
    return _norm_argmax(x, norm_weight, norm_bias, eps, weight, weight_scale)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + residual in one launch.

    Args:
        x: (rows, K) contiguous; weight: (N, K); bias: (N,) or None; residual: (rows, N) contiguous.
        weight_scale: as in `norm_linear`.

    Returns:
        (rows, N) in x's dtype.
    """
    _, N = check_rows(x, weight, weight_scale)
    check_all(x, {"bias": (bias, (N,)), "residual": (residual, (len(x), N))})
    return _linear(x, weight, weight_scale, bias, residual)


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * weight_scale[:, None]).T + bias, reading the weights as int8.

    Args:
        x: (rows, K) contiguous, 1 to 64 rows; 1 to 16 in float32.
        weight: (N, K) int8, contiguous; weight_scale: (N,) float32; bias: (N,) or None.

    Returns:
        (rows, N) in x's dtype.
    """
    _, N = check_rows(x, weight, weight_scale)
    check_all(x, {"bias": (bias, (N,))})
    return _linear(x, weight, weight_scale, bias)


def norm_qkv_to_cache(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    lengths: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """layer_norm(x) @ weight.T + bias: returns the queries, and writes the keys and values into one
    layer's cache.

    Args:
        x: (B * T, C) contiguous: the T new tokens of row 0, then those of row 1, and so on.
        norm_weight, norm_bias, eps: as in `norm_linear`.
        weight, bias: those of c_attn, (C + 2GD, C) and (C + 2GD,) or None. For each key/value head
            the outputs are its H / G query heads, its K and its V: with G = 1 all queries, then K,
            then V; with G = H q, K and V head by head.
        slots: (B, max_length, G, 2D), each head's K, then its V; written at positions lengths[b] to
            lengths[b] + T - 1 of row b. Positions from max_length on are not written.
        lengths: (B,) int64 on the device: how many tokens each row of the cache already holds.
        weight_scale: as in `norm_linear`.

    Returns:
        q (B, T, H, D) in x's dtype.
    """
    C, N = check_rows(x, weight, weight_scale)
    if slots.ndim != 4 or slots.shape[3] % 2 or slots.stride(3) != 1:
        raise ValueError(
            f"slots has shape {tuple(slots.shape)} and strides {slots.stride()}: it must be "
            "(B, max_length, G, 2D), contiguous along the last dimension"
        )
    B, _, G, D = *slots.shape[:3], slots.shape[3] // 2
    if B == 0 or len(x) % B or G * D == 0 or C % (G * D) or N != C + 2 * G * D:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and slots {tuple(slots.shape)} do "
            "not match: x must be (B * T, C), weight (C + 2GD, C) and slots (B, max_length, G, 2D)"
        )
    check_all(x, {"norm_weight": (norm_weight, (C,)), "norm_bias": (norm_bias, (C,))})
    check_all(x, {"bias": (bias, (N,))})
    if slots.dtype != x.dtype or slots.device != x.device or slots.requires_grad:
        raise ValueError(
            f"slots is {slots.dtype} on {slots.device}: it must be {x.dtype} on {x.device}, "
            "without a gradient"
        )
    matches = lengths.dtype == torch.int64 and lengths.shape == (B,) and lengths.is_contiguous()
    if not matches or lengths.device != x.device:
        raise ValueError(
            f"lengths is {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}: it must be "
            f"int64 ({B},), contiguous, on {x.device}"
        )
    return _norm_qkv_to_cache(
        x, norm_weight, norm_bias, eps, weight, bias, slots, lengths, weight_scale
    )


def _norm_many(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x and a product's norm; for many rows, by a kernel of its own, layer_norm(x) and no norm."""
    if weight is None or len(x) <= FEW_ROWS:
        return x, weight, bias
    out, K = torch.empty_like(x), x.shape[1]
    norm_kernel[(len(x),)](
        x, weight, bias, out, eps, K=K, CHUNK=min(triton.next_power_of_2(K), 4096),
        PREFETCH=prefetch_bytes(x, 1), **launch.overlap(x.device),
    )  # fmt: skip
    return out, None, None


@torch.library.custom_op("mqa_kernels::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
) -> Tensor:
    """activation(layer_norm(x) @ weight.T + bias) + residual; what is None is left out."""
    (rows, K), N = x.shape, len(weight)
    out = x.new_empty((rows, N))
    int8 = weight_scale is not None
    tiles = linear_tiles(x.dtype, rows, N, K, int8, multiprocessors(x.device))
    with torch.cuda.device_of(x):
        x, norm_weight, norm_bias = _norm_many(x, norm_weight, norm_bias, eps)
        linear_kernel[(triton.cdiv(N, tiles.BLOCK_N),)](
            x, norm_weight, norm_bias, weight, weight_scale, bias, residual, out, eps, rows, N,
            K=K, ACTIVATION=activation, **tiles._asdict(),
            PREFETCH=prefetch_bytes(weight, tiles.BLOCK_N), **launch.overlap(x.device),
        )  # fmt: skip
    return out


@torch.library.custom_op("mqa_kernels::norm_qkv_to_cache", mutates_args=("slots",))
def _norm_qkv_to_cache(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    lengths: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    (rows, C), N = x.shape, len(weight)
    B, max_length, G, D = *slots.shape[:3], slots.shape[3] // 2
    T = rows // B
    q = x.new_empty((B, T, C // D, D))
    int8 = weight_scale is not None
    tiles = linear_tiles(x.dtype, rows, N, C, int8, multiprocessors(x.device))
    with torch.cuda.device_of(x):
        x, norm_weight, norm_bias = _norm_many(x, norm_weight, norm_bias, eps)
        qkv_kernel[(triton.cdiv(N, tiles.BLOCK_N),)](
            x, norm_weight, norm_bias, weight, weight_scale, bias, slots, lengths, q,
            eps, rows, T, N, max_length, *slots.stride()[:3],
            K=C, QUERY=C // G, D=D, **tiles._asdict(),
            PREFETCH=prefetch_bytes(weight, tiles.BLOCK_N), **launch.overlap(x.device),
        )  # fmt: skip
    return q


@torch.library.custom_op("mqa_kernels::norm_argmax", mutates_args=())
def _norm_argmax(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (rows, C), V = x.shape, len(weight)
    int8 = weight_scale is not None
    tiles = linear_tiles(x.dtype, rows, V, C, int8, multiprocessors(x.device))
    options = launch.overlap(x.device)
    parts = triton.cdiv(V, tiles.BLOCK_N)
    best = x.new_empty((rows, parts), dtype=torch.int64)
    ids, values = x.new_empty(rows, dtype=torch.int64), x.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        x, norm_weight, norm_bias = _norm_many(x, norm_weight, norm_bias, eps)
        argmax_kernel[(parts,)](
            x, norm_weight, norm_bias, weight, weight_scale, best, eps, rows, V,
            K=C, **tiles._asdict(), PREFETCH=prefetch_bytes(weight, tiles.BLOCK_N), **options,
        )  # fmt: skip
        choose_kernel[(rows,)](best, ids, values, parts, BLOCK=choose_block(parts), **options)
    return ids, values


@_linear.register_fake
def _(x, weight, *others):
    return x.new_empty((len(x), len(weight)))


@_norm_qkv_to_cache.register_fake
def _(x, norm_weight, norm_bias, eps, weight, bias, slots, lengths, weight_scale=None):
    B, D = slots.shape[0], slots.shape[3] // 2
    return x.new_empty((B, x.shape[0] // B, x.shape[1] // D, D))


@_norm_argmax.register_fake
def _(x, norm_weight, norm_bias, eps, weight, weight_scale=None):
    return x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)
