"""The model's decode step in the kernels of `mqa_kernels`, for few rows.

With few rows a step takes the time of reading the weights, if nothing interrupts the reading. The
modules of `mqa_gpt.model` start about a dozen kernels per layer, most of which read hardly
anything. Here each weight is read by a kernel that does all the work between it and the next
weight. A layer is four products and attention, which is two launches where its keys are split; with
more than 16 rows two layer norms more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from mqa_gpt.attention import HAS_TRITON, auto_attention
from mqa_gpt.cache import KVCache
from mqa_gpt.config import ACTIVATIONS
from mqa_gpt.fast.int8 import Int8Linear
from mqa_gpt.fast.plain import is_plain
from mqa_gpt.model import GPT, Block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_fuse(model: GPT, rows: int) -> bool:
    """Whether `fused_hidden` computes what the model would, and this many rows are few enough.

    It replaces Triton's attention on CUDA devices only, and only modules that are as the model made
    them, of the config's sizes.
    """
    if not HAS_TRITON or model.device.type != "cuda":
        return False
    from mqa_kernels import attention, most_rows

    return (
        model.dtype in DTYPES
        and rows <= most_rows(model.device, model.dtype)
        and model.config.head_dim <= 256
        and is_plain(model)
        and model.lm_head.bias is None
        and all(parameter.is_contiguous() for parameter in model.parameters())
        and all(
            module.weight is not None
            for module in model.modules()
            if isinstance(module, nn.LayerNorm)
        )
        and all(
            block.attn.attend in (auto_attention, attention)
            and block.attn.n_head == model.config.n_head
            and block.attn.n_kv_head == model.config.n_kv_head
            for block in _blocks(model)
        )
    )


def fused_hidden(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """The residual stream (B, C) after all blocks, before `ln_f`, of one new token per row.

    Args:
        ids: (B, 1) int64, B at most `most_rows`.
        cache: a static one; its active rows grow by one position.
    """
    from mqa_kernels import attention, linear_residual, norm_linear, norm_qkv_to_cache

    transformer, lengths = model.transformer, cache.lengths
    x = transformer.wte(ids[:, 0]) + transformer.wpe(lengths)  # (B, C)
    for block in _blocks(model):
        attn, mlp = block.attn, block.mlp
        slots = cache.kv[attn.layer]  # (B, max_length, G, 2D)
        weight, scale = _weight(attn.c_attn)
        q = norm_qkv_to_cache(
            x, *_norm(block.ln_1), weight, attn.c_attn.bias, slots, lengths, scale
        )  # (B, 1, H, D)
        k, v = slots.chunk(2, dim=-1)  # (B, max_length, G, D) each
        y = attention(q, k, v, lengths, attn.scale)  # (B, 1, H, D)
        weight, scale = _weight(attn.c_proj)
        x = linear_residual(y.flatten(1), weight, attn.c_proj.bias, x, scale)  # (B, C)
        weight, scale = _weight(mlp.c_fc)
        activation = ACTIVATIONS[mlp.activation]
        h = norm_linear(x, *_norm(block.ln_2), weight, mlp.c_fc.bias, activation, scale)  # (B, F)
        weight, scale = _weight(mlp.c_proj)
        x = linear_residual(h, weight, mlp.c_proj.bias, x, scale)  # (B, C)
    cache.advance(1)
    return x


def fused_logits(model: GPT, x: Tensor) -> Tensor:
    """Logits (B, V) of what `fused_hidden` returned."""
    from mqa_kernels import norm_lm_head

    return norm_lm_head(x, *_norm(model.transformer.ln_f), *_weight(model.lm_head))


def fused_argmax(model: GPT, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's likeliest token (B,) int64 and its logit (B,) float32, which is NaN if any is."""
    from mqa_kernels import norm_argmax

    return norm_argmax(x, *_norm(model.transformer.ln_f), *_weight(model.lm_head))


def _blocks(model: GPT) -> Iterable[Block]:
    return cast(Iterable[Block], model.transformer.h)


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _weight(layer: nn.Linear | Int8Linear) -> tuple[Tensor, Tensor | None]:
    """A layer's weight, and its rows' scales if it has 8 bits."""
    return layer.weight, layer.weight_scale if isinstance(layer, Int8Linear) else None
