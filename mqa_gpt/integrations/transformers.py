"""The Triton kernels for transformers' own `GPTBigCodeForCausalLM`.

    from mqa_gpt.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mqa_triton")

transformers has two hooks for this: an attention function, called by every layer, and a mask
function, called once per forward pass. Kernels that know where each row begins need no mask
(B, 1, T, S), so the mask function hands over just that: (2, B, 1, 1) int64, the slot of each row's
first query, and how many slots of padding stand before its first token. Four dimensions, because
those are what transformers passes on as they are.
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

    They do causal self-attention, multi-query or multi-head, cached or not, with padding on either
    side, forward and backward, on CUDA devices.

    Raises:
        ImportError: Triton is not installed, or transformers is too old.
    """
    import mqa_kernels  # noqa: F401  fail here rather than in the first forward pass

    if "q_length" not in inspect.signature(eager_mask).parameters:
        raise ImportError("mqa_gpt.integrations needs transformers 5.4 or later: upgrade it")
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
    """Where the rows stand: start and left padding of each, (2, B, 1, 1) int64.

    Args:
        batch_size, q_length, kv_length: B, T, S.
        q_offset: slot of the first query, an int or a tensor of one.
        kv_offset: slot of the first key; always 0 here.
        mask_function: the pattern that transformers asks for.
        attention_mask: (B, slots in use) bool, False where there is padding.
        device: where the result goes.

    Raises:
        ValueError: anything but a causal mask with padding at the rows' ends.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "mqa_triton attention is causal and nothing else: packed sequences (position_ids that "
            "begin again within a row) and other masks need attn_implementation='sdpa'"
        )
    rows = torch.zeros(2, batch_size, 1, 1, dtype=torch.int64, device=device)
    rows[0] = q_offset
    if attention_mask is not None:
        # Padding on the right is seen by no token. A gap between tokens would be.
        if not torch.compiler.is_compiling():
            begins = F.pad(attention_mask, (1, 0)).int().diff(dim=1) == 1  # (B, slots)
            if (begins.sum(1) > 1).any():
                raise ValueError(
                    "attention_mask has padding between tokens: mqa_triton attention takes it at a "
                    "row's beginning or end only; pad on the left before generating"
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
        module: the layer; not used.
        query: (B, H, T, D).
        key, value: (B, G, S, D).
        attention_mask: what `_rows` made.
        scaling: what the scores are multiplied by.
        dropout: share of the probabilities that is dropped.

    Returns:
        (B, T, H, D), and None in place of the probabilities, which are never there as a whole.

    Raises:
        ValueError: a ready-made mask (B, 1, T, S), or no CUDA device.
    """
    from mqa_kernels import attention

    if attention_mask is None or attention_mask.dtype != torch.int64:
        raise ValueError(
            "mqa_triton attention takes attention_mask as (batch, tokens), not ready-made in four "
            "dimensions"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    start, left_padding = attention_mask.view(2, -1)  # (B,) each
    out = attention(q, k, v, start, scaling, dropout, left_padding=left_padding)
    return out, None
