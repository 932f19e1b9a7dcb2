"""What decoding with few rows calls: checked arguments, launches, registration with PyTorch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mqa_kernels import launch
from mqa_kernels.argmax import argmax_kernel, choose_kernel
from mqa_kernels.fused import linear_kernel, qkv_kernel
from mqa_kernels.launch import check_all, check_rows
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
    """activation(layer_norm(x) @ weight.T + bias) for few rows, in one launch.

    Statistics and sums are float32; the normalised row is rounded to the model's dtype. This and
    the functions below are for inference: nothing is differentiable. On GPUs from sm_90 on they
    start before the previous launch has ended and read weights at once. So neither the launches of
    this package directly before, one behind the other, nor the one before them may write the
    weights.

    Args:
        x: (R, C) contiguous, R from 1 to 16, in float32, bfloat16 or float16.
        norm_weight, norm_bias: (C,).
        eps: added to the variance.
        weight: (N, C) contiguous, as `nn.Linear` holds it.
        bias: (N,) or None.
        activation: "none", "relu", "gelu" (exact) or "gelu_tanh".
        weight_scale: (N,) float32 for a weight of int8, each of whose rows it multiplies; else
            None. Here and below, only the weight is int8: x keeps its dtype.

    Returns:
        (R, N) in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, a gradient would be needed, or
            there is no GPU (nor Triton's interpreter) to run on.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}: it must be one of {', '.join(ACTIVATIONS)}"
        )
    C, N = check_rows(x, weight, weight_scale)
    check_all(x, {"norm_weight": (norm_weight, (C,)), "norm_bias": (norm_bias, (C,))})
    check_all(x, {"bias": (bias, (N,))})
    return norm_linear_op(x, norm_weight, norm_bias, eps, weight, bias, activation, weight_scale)


def norm_lm_head(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Logits (R, V) of layer_norm(x) for the vocabulary's weight (V, C): `norm_linear`, no bias."""
    return norm_linear(x, norm_weight, norm_bias, eps, weight, weight_scale=weight_scale)


def norm_argmax(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest logit of each row of `norm_lm_head`, without writing the logits.

    Returns:
        ids (R,) int64, the lowest of those that share the largest logit, and that logit (R,)
        float32. NaN counts as the largest: what is not finite is seen by looking at the logit.
    """
    C, _ = check_rows(x, weight, weight_scale)
    check_all(x, {"norm_weight": (norm_weight, (C,)), "norm_bias": (norm_bias, (C,))})
    return norm_argmax_op(x, norm_weight, norm_bias, eps, weight, weight_scale)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + residual for few rows, in one launch.

    Args:
        x: (R, K) contiguous; weight: (N, K); bias: (N,) or None; residual: (R, N) contiguous.
        weight_scale: as in `norm_linear`.

    Returns:
        (R, N) in x's dtype.
    """
    _, N = check_rows(x, weight, weight_scale)
    check_all(x, {"bias": (bias, (N,)), "residual": (residual, (len(x), N))})
    return linear_residual_op(x, weight, bias, residual, weight_scale)


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight * weight_scale).T + bias, which reads the integers as they are.

    For a layer by itself, so it takes more rows, and starts when the launches before it have ended:
    any of them may write the weights.

    Args:
        x: (R, K) contiguous, R from 1 to 64; in float32, to 16.
        weight: (N, K) int8, contiguous; weight_scale: (N,) float32; bias: (N,) or None.

    Returns:
        (R, N) in x's dtype.
    """
    _, N = check_rows(x, weight, weight_scale, launch.MAX_INT8_ROWS.get(x.dtype, launch.MAX_ROWS))
    check_all(x, {"bias": (bias, (N,))})
    return int8_linear_op(x, weight, weight_scale, bias)


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
    """Queries of layer_norm(x), whose keys and values go straight into one layer's cache.

    Args:
        x: (B * T, C) contiguous: the T new tokens of row 0, then those of row 1, and so on.
        norm_weight, norm_bias, eps: as in `norm_linear`.
        weight, bias: c_attn's, (C + 2GD, C) and (C + 2GD,) or None. For each key/value head it has
            its H / G query heads, its K and its V: with G = 1 all queries, then K, then V; with
            G = H q, K and V head by head.
        slots: (B, max_length, G, 2D), K and V of a head side by side; written at positions
            lengths[b] to lengths[b] + T - 1 of each row. What is behind max_length is not written.
        lengths: (B,) int64 on the device: the tokens that each row holds before.
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
            "not fit: x must be (B * T, C), weight (C + 2GD, C) and slots (B, max_length, G, 2D)"
        )
    check_all(x, {"norm_weight": (norm_weight, (C,)), "norm_bias": (norm_bias, (C,))})
    check_all(x, {"bias": (bias, (N,))})
    if slots.dtype != x.dtype or slots.device != x.device or slots.requires_grad:
        raise ValueError(
            f"slots is {slots.dtype} on {slots.device}: it must be {x.dtype} on {x.device}, and "
            "need no gradient"
        )
    right = lengths.dtype == torch.int64 and lengths.shape == (B,) and lengths.is_contiguous()
    if not right or lengths.device != x.device:
        raise ValueError(
            f"lengths is {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}: it must be "
            f"int64 ({B},), contiguous, on {x.device}"
        )
    return norm_qkv_to_cache_op(
        x, norm_weight, norm_bias, eps, weight, bias, slots, lengths, weight_scale
    )


def _norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    weight_scale: Tensor | None = None,
) -> Tensor:
    return _linear(x, norm_weight, norm_bias, eps, weight, weight_scale, bias, None, activation)


def _linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    return _linear(x, None, None, 0.0, weight, weight_scale, bias, residual, "none")


def _int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(
        x, None, None, 0.0, weight, weight_scale, bias, None, "none", launch.NO_OVERLAP
    )  # fmt: skip


def _linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    options: dict[str, bool] | None = None,
) -> Tensor:
    (R, K), N = x.shape, len(weight)
    out = x.new_empty((R, N))
    tiles = linear_tiles(x.dtype, R, N, K, weight_scale is not None)
    options = options or launch.overlap(x.device)
    with torch.cuda.device_of(x):
        linear_kernel[(triton.cdiv(N, tiles.BLOCK_N),)](
            x, norm_weight, norm_bias, weight, weight_scale, bias, residual, out, eps, R, N,
            K=K, ACTIVATION=activation, **tiles._asdict(), **options,
        )  # fmt: skip
    return out


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
    (R, K), N = x.shape, len(weight)
    B, max_length, G, D = *slots.shape[:3], slots.shape[3] // 2
    q = x.new_empty((B, R // B, K // D, D))
    tiles = linear_tiles(x.dtype, R, N, K, weight_scale is not None)
    options = launch.overlap(x.device)
    with torch.cuda.device_of(x):
        qkv_kernel[(triton.cdiv(N, tiles.BLOCK_N),)](
            x, norm_weight, norm_bias, weight, weight_scale, bias, slots, lengths, q,
            eps, R, R // B, N, max_length, *slots.stride()[:3],
            K=K, QUERY=K // G, D=D, **tiles._asdict(), **options,
        )  # fmt: skip
    return q


def _norm_argmax(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (R, K), N = x.shape, len(weight)
    tiles = linear_tiles(x.dtype, R, N, K, weight_scale is not None)
    options = launch.overlap(x.device)
    parts = triton.cdiv(N, tiles.BLOCK_N)
    best = x.new_empty((R, parts), dtype=torch.int64)
    ids, values = x.new_empty(R, dtype=torch.int64), x.new_empty(R, dtype=torch.float32)
    with torch.cuda.device_of(x):
        argmax_kernel[(parts,)](
            x, norm_weight, norm_bias, weight, weight_scale, best, eps, R, N,
            K=K, **tiles._asdict(), **options,
        )  # fmt: skip
        choose_kernel[(R,)](best, ids, values, parts, BLOCK=choose_block(parts), **options)
    return ids, values


norm_linear_op = torch.library.custom_op("mqa_kernels::norm_linear", _norm_linear, mutates_args=())
linear_residual_op = torch.library.custom_op(
    "mqa_kernels::linear_residual", _linear_residual, mutates_args=()
)
int8_linear_op = torch.library.custom_op("mqa_kernels::int8_linear", _int8_linear, mutates_args=())
norm_qkv_to_cache_op = torch.library.custom_op(
    "mqa_kernels::norm_qkv_to_cache", _norm_qkv_to_cache, mutates_args=("slots",)
)
norm_argmax_op = torch.library.custom_op("mqa_kernels::norm_argmax", _norm_argmax, mutates_args=())


@norm_linear_op.register_fake
def _(x, norm_weight, norm_bias, eps, weight, bias, activation, weight_scale=None):
    return x.new_empty((x.shape[0], weight.shape[0]))


@linear_residual_op.register_fake
def _(x, weight, bias, residual, weight_scale=None):
    return torch.empty_like(residual)


@int8_linear_op.register_fake
def _(x, weight, weight_scale, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


@norm_qkv_to_cache_op.register_fake
def _(x, norm_weight, norm_bias, eps, weight, bias, slots, lengths, weight_scale=None):
    B, D = slots.shape[0], slots.shape[3] // 2
    return x.new_empty((B, x.shape[0] // B, x.shape[1] // D, D))


@norm_argmax_op.register_fake
def _(x, norm_weight, norm_bias, eps, weight, weight_scale=None):
    R = x.shape[0]
    return x.new_empty(R, dtype=torch.int64), x.new_empty(R, dtype=torch.float32)
