"""The kernels' formulas in plain PyTorch, for reading and for checking them one by one.

Attention itself has its reference in `mqa_gpt.attention`; here is what the kernels compute besides.
Shapes as there, with R = H / G query heads of a group; everything is in the dtype of the arguments,
so float64 arguments give a float64 answer.
"""

from __future__ import annotations

import torch
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
