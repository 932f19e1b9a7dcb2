"""The kernels' formulas in plain PyTorch, for reading and for checking them one by one.

Attention itself has its reference in `mqa_gpt.attention`; here is what the kernels compute besides,
and at the end what a step of decoding fuses. Shapes as there, with R = H / G query heads of a
group; everything is in the dtype of the arguments, so float64 arguments give a float64 answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scores_of(q: Tensor, k: Tensor, start: int | Tensor, scale: float) -> Tensor:
    """Scaled scores (B, T, H, S); -inf where a query does not see the slot."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    scores = torch.einsum("btgrd,bsgd->btgrs", q.reshape(B, T, G, H // G, D), k) * scale
    starts = torch.as_tensor(start, device=q.device).expand(B)
    positions = starts[:, None] + torch.arange(T, device=q.device)  # (B, T)
    hidden = torch.arange(S, device=q.device) > positions[:, :, None]  # (B, T, S)
    return scores.reshape(B, T, H, S).masked_fill(hidden[:, :, None], float("-inf"))


def log_sum_exp(q: Tensor, k: Tensor, start: int | Tensor, scale: float) -> Tensor:
    """The log-sum-exp of every query's scores, (B, T, H)."""
    return scores_of(q, k, start, scale).logsumexp(-1)


def combine(parts: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint shares of the keys.

    Args:
        parts: (N, B, T, H, D), the attention over each of N shares by itself.
        lses: (N, B, T, H), its log-sum-exp; -inf for a share in which the query sees nothing.

    Returns:
        The attention over all keys, (B, T, H, D), and its log-sum-exp, (B, T, H).
    """
    lse = lses.logsumexp(0)  # (B, T, H)
    weights = (lses - lse).exp()  # (N, B, T, H); they sum to 1
    return (parts * weights[..., None]).sum(0), lse


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, start: int | Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, T, H, D), dk and dv (B, S, G, D), by the formulas at the top of `backward.py`."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    scores = scores_of(q, k, start, scale)  # (B, T, H, S)
    P = (scores - scores.logsumexp(-1, keepdim=True)).exp().view(B, T, G, H // G, S)
    grouped_q, grouped_do = q.reshape(B, T, G, H // G, D), do.reshape(B, T, G, H // G, D)
    dP = torch.einsum("btgrd,bsgd->btgrs", grouped_do, v)
    delta = (do * out).sum(-1).view(B, T, G, H // G, 1)
    dS = P * (dP - delta)  # (B, T, G, R, S)
    dq = torch.einsum("btgrs,bsgd->btgrd", dS, k).reshape(B, T, H, D) * scale
    dk = torch.einsum("btgrs,btgrd->bsgd", dS, grouped_q) * scale  # sums over the group's heads
    dv = torch.einsum("btgrs,btgrd->bsgd", P, grouped_do)
    return dq, dk, dv


def dequantized(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What an int8 weight (N, K) and its rows' scales (N,) stand for; a weight without them."""
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
    """activation(layer_norm(x (R, C)) @ weight.T + bias), (R, N)."""
    x = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps)
    x = F.linear(x, dequantized(weight, weight_scale, x.dtype), bias)
    if activation == "relu":
        return F.relu(x)
    if activation == "none":
        return x
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def norm_argmax(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest of each row's logits: its index (R,), the lowest among equals, and itself."""
    logits = norm_linear(
        x, norm_weight, norm_bias, eps, weight, weight_scale=weight_scale
    )  # (R, V)
    return logits.argmax(-1), logits.amax(-1)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """x (R, K) @ weight.T + bias + residual, (R, N)."""
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
    T, R = len(x) // B, x.shape[1] // (G * D)
    qkv = norm_linear(x, norm_weight, norm_bias, eps, weight, bias, "none", weight_scale)
    qkv = qkv.view(B, T, G, (R + 2) * D)  # of each key/value head its queries, K and V
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            if 0 <= length + t < max_length:
                slots[b, length + t] = qkv[b, t, :, R * D :]
    return qkv[..., : R * D].reshape(B, T, G * R, D)
