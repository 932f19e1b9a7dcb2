"""The Triton kernels for transformers' own `GPTBigCodeForCausalLM`.

    from mqa_gpt.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mqa_triton")

transformers has two hooks for this: an attention function, called by every layer, and a mask
function, called once per forward pass. The kernels need no mask (B, 1, T, S), only where each row
starts. So the mask function returns (2, B, 1, 1) int64 instead: the slot of each row's first query,
and the number of padding slots before its first token. It has four dimensions because transformers
passes such masks on unchanged.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, eager_mask


def register(name: str = "mqa_triton") -> None:
    """Make the kernels available to transformers as `attn_implementation=name`.

    They compute causal self-attention, multi-query or multi-head, with or without a cache, with
    padding on either side, forward and backward, on CUDA devices.

    Raises:
        ImportError: Triton is not installed, or transformers is too old.
    """
    import mqa_kernels  # noqa: F401  fail here, not in the first forward pass

    if "q_length" not in inspect.signature(eager_mask).parameters:
        raise ImportError("mqa_gpt.integrations.transformers needs transformers 5.4 or later")
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, _rows)


def _rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> Tensor:
    """Each row's start and left padding: (2, B, 1, 1) int64.

    Args:
        batch_size, q_length, kv_length: B, T, S.
        q_offset: slot of the first query, an int or a tensor with one element.
        kv_offset: slot of the first key; always 0 here.
        mask_function: the mask pattern that transformers requests.
        attention_mask: (B, slots in use) bool, False for padding.
        device: of the result.

    Raises:
        ValueError: the mask is not causal, or padding lies between tokens.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "mqa_triton attention supports causal masks only: for packed sequences (position_ids "
            "that restart within a row) and other masks use attn_implementation='sdpa'"
        )
    rows = torch.zeros(2, batch_size, 1, 1, dtype=torch.int64, device=device)
    rows[0] = q_offset
    if attention_mask is not None:
        # No token sees padding on its right, but later tokens would see a gap.
        if not torch.compiler.is_compiling():
            begins = F.pad(attention_mask, (1, 0)).int().diff(dim=1) == 1  # (B, slots)
            if (begins.sum(1) > 1).any():
                raise ValueError(
                    "attention_mask has padding between tokens: mqa_triton attention takes it only "
                    "at a row's start or end; pad on the left before generating"
                )
        rows[1, :, 0, 0] = (attention_mask.int().cumsum(1) == 0).sum(1)
    return rows


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, in transformers' layout.

    Args:
        module: the layer; unused.
        query: (B, H, T, D).
        key, value: (B, G, S, D).
        attention_mask: (2, B, 1, 1) int64 from `_rows`.
        scaling: factor of the scores.
        dropout: share of the probabilities to drop.

    Returns:
        (B, T, H, D), and None for the probabilities, which are never materialized.

    Raises:
        ValueError: attention_mask is a full mask (B, 1, T, S), or there is no CUDA device.
    """
    from mqa_kernels import attention

    if attention_mask is None or attention_mask.dtype != torch.int64:
        raise ValueError(
            "mqa_triton attention takes attention_mask as (batch, tokens), not as a full mask with "
            "four dimensions"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    start, left_padding = attention_mask.view(2, -1)  # (B,) each
    out = attention(q, k, v, start, scaling, dropout, left_padding=left_padding)
    return out, None
