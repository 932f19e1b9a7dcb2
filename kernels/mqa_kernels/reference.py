"""The kernels' formulas in plain PyTorch: slow, obvious, and what the tests compare with.

Everything is computed in the arguments' dtype, except softmax, which is float32 at least. So
float64 arguments give a float64 answer. Dimensions as in `forward.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_slots(
    q: Tensor,
    k: Tensor,
    start: int | Tensor = 0,
    lengths: Tensor | None = None,
    left_padding: Tensor | None = None,
) -> Tensor:
    """(B, T, S) bool: which slots of k (B, S, G, D) each query of q (B, T, H, D) sees.

    Arguments as of `attention` in `ops.py`.
    """
    B, T, S = *q.shape[:2], k.shape[1]
    start, lengths, left = (
        torch.as_tensor(default if x is None else x, device=q.device).expand(B)[:, None, None]
        for x, default in ((start, 0), (lengths, T), (left_padding, 0))
    )  # (B, 1, 1)
    t, s = torch.arange(T, device=q.device)[:, None], torch.arange(S, device=q.device)
    return (s <= start + t) & (s >= left) & (t < lengths)


def scores_of(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Scaled scores (B, T, H, S) of q (B, T, H, D) and k (B, S, G, D), -inf where not `visible`
    (B, T, S); the product in their dtype, then float32 at least."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    scores = torch.einsum("btghd,bsgd->btghs", q.reshape(B, T, G, H // G, D), k) * scale
    scores = scores.reshape(B, T, H, S).masked_fill(~visible[:, :, None], float("-inf"))
    return scores.to(torch.promote_types(q.dtype, torch.float32))


def log_sum_exp(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The natural log-sum-exp of each query's scores, (B, T, H)."""
    return scores_of(q, k, visible, scale).logsumexp(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    factors: Tensor | float = 1.0,
) -> Tensor:
    """softmax(scale q k^T) v: (B, T, H, D). A query that sees nothing gets zeros.

    Args:
        visible: as `visible_slots` returns.
        factors: of the probabilities (B, T, H, S). Dropout's are 0 and 1 / (1 - p).
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    probabilities = scores_of(q, k, visible, scale).softmax(-1) * factors
    probabilities = probabilities.where(visible.any(-1)[:, :, None, None], 0.0).to(q.dtype)
    grouped = probabilities.view(B, T, G, H // G, S)
    return torch.einsum("btghs,bsgd->btghd", grouped, v).reshape(B, T, H, D)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, start: int | Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, T, H, D), dk and dv (B, S, G, D), by the formulas at the top of `backward.py`.

    do and out are (B, T, H, D), v is (B, S, G, D).
    """
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    scores = scores_of(q, k, visible_slots(q, k, start), scale)  # (B, T, H, S)
    P = (scores - scores.logsumexp(-1, keepdim=True)).exp().to(q.dtype).view(B, T, G, H // G, S)
    q, do = (x.reshape(B, T, G, H // G, D) for x in (q, do))
    dP = torch.einsum("btghd,bsgd->btghs", do, v)
    delta = (do * out.view(do.shape)).sum(-1, keepdim=True)  # (B, T, G, H/G, 1)
    dS = P * (dP - delta)  # (B, T, G, H/G, S)
    dq = torch.einsum("btghs,bsgd->btghd", dS, k).reshape(B, T, H, D) * scale
    dk = torch.einsum("btghs,btghd->bsgd", dS, q) * scale  # sums over the group's heads
    dv = torch.einsum("btghs,btghd->bsgd", P, do)
    return dq, dk, dv


def dequantized(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An int8 weight (N, K) times its rows' scales (N,), in `dtype`; unchanged without scales."""
    return weight if weight_scale is None else (weight * weight_scale[:, None]).to(dtype)


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
    """activation(layer_norm(x (rows, C)) @ weight.T + bias): (rows, N)."""
    x = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps)
    x = F.linear(x, dequantized(weight, weight_scale, x.dtype), bias)
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


def norm_argmax(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The argmax of each row's logits (rows,), the lowest index in a tie, and the logit (rows,)."""
    logits = norm_linear(
        x, norm_weight, norm_bias, eps, weight, weight_scale=weight_scale
    )  # (rows, V)
    return logits.argmax(-1), logits.amax(-1)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """x (rows, K) @ weight.T + bias + residual: (rows, N)."""
    return F.linear(x, dequantized(weight, weight_scale, x.dtype), bias) + residual


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
    """q (B, T, H, D) of layer_norm(x (B * T, C)); K and V go to slots (B, max_length, G, 2D)."""
    B, max_length, G, D = *slots.shape[:3], slots.shape[3] // 2
    T, H = len(x) // B, x.shape[1] // D
    qkv = norm_linear(x, norm_weight, norm_bias, eps, weight, bias, "none", weight_scale)
    q, kv = qkv.view(B, T, G, -1).split([H // G * D, 2 * D], dim=-1)
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            if 0 <= length + t < max_length:
                slots[b, length + t] = kv[b, t]
    return q.reshape(B, T, H, D)
