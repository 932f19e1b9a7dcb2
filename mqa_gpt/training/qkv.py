"""The rows of `c_attn`: queries, keys and values apart, and together again."""

from __future__ import annotations

import torch
from torch import Tensor

from mqa_gpt.config import GPTConfig


def split_qkv(qkv: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The weight (C + 2GD, C) or bias (C + 2GD,) of `c_attn` -> q (C, ...), k and v (GD, ...).

    MQA stores the parts one after the other, and these are views; MHA stores q, k and v head by
    head, and these are copies.
    """
    H, G, D = config.n_head, config.n_kv_head, config.head_dim
    if G == 1:
        return qkv[: H * D], qkv[H * D : (H + 1) * D], qkv[(H + 1) * D :]
    q, k, v = qkv.view(H, 3, D, *qkv.shape[1:]).unbind(1)  # (H, D, ...) each
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def join_qkv(q: Tensor, k: Tensor, v: Tensor, config: GPTConfig) -> Tensor:
    """What `split_qkv` split: q (C, ...), k and v (GD, ...) -> (C + 2GD, ...)."""
    if config.n_kv_head == 1:
        return torch.cat([q, k, v])
    shape = (config.n_head, config.head_dim, *q.shape[1:])
    return torch.stack([part.view(shape) for part in (q, k, v)], dim=1).flatten(0, 2)
